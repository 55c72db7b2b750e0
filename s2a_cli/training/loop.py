"""Trains one run epoch by epoch.

It can be broken off between any two steps, and goes on exactly as if it had not been: all randomness is a function of
(seed, epoch, step) or (seed, epoch, image), so that a state is no more than tensors, a place and the figures so far.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from s2a_cli import data, memory
from s2a_cli.activations.quant.calibration import LOOKS
from s2a_cli.common import distributed, files
from s2a_cli.common.errors import RunError
from s2a_cli.common.interrupts import guarded, stopping
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import first_line, listed
from s2a_cli.results import record
from s2a_cli.training import checkpoints, duration
from s2a_cli.training.evaluation import accuracy, chosen_by, describe, sent
from s2a_cli.training.pending import Pending
from s2a_cli.training.step import Step, make_optimizer, stays_in_pixels, train_mode

if TYPE_CHECKING:
    from s2a_cli.training.run import Run

WARMUP_STEPS = 3  # left out of throughput and of measured memory


@dataclass
class TrainState:
    """States where a run is: the next step is `step` (from 0) of `epoch` (from 1), and what came out before it."""

    epoch: int = 1
    step: int = 0
    loss: float = 0.0  # summed over the images of this epoch
    images: int = 0  # of this epoch
    seconds: float = 0.0  # of this epoch
    lr: float = 0.0  # of the last step
    rates: list[float] = field(default_factory=list)  # images a second, of each step
    lines: list[str] = field(default_factory=list)  # of metrics.jsonl
    best: list[float] = field(
        default_factory=lambda: [-1.0, 0.0]
    )  # what it is chosen by on validation, and -loss: small splits tie often


class TrainLoop:
    """Trains a run, keeps the tensors of the epoch that is best on validation, tests these once.

    board: a SummaryWriter, or None. Call it with the run's state, if there is one, which it empties:
    `TrainLoop(...)(checkpoints.load_state(folder))`. Notes accuracy, speed and, on CUDA, memory in `known`.
    """

    def __init__(self, run: Run, folder: Path, known: record.RecordBuilder, board: Any = None):
        self.run, self.folder, self.known, self.board = run, folder, known, board
        self.optim = run.config.optim
        self.step = Step(run.config, run.device, run.attached, run.criterion())
        self.optimizer = make_optimizer(self.optim, run.model, run.attached)
        self.loader, self.validation = run.loader("train", train=True), run.loader("val")
        self.schedule = LambdaLR(self.optimizer, lr_factor(self.optim, len(self.loader)))
        self.mix = mixing(self.optim, len(run.splits.classes))
        self.meter = memory.meter(run.device, WARMUP_STEPS)
        self.sofar = TrainState()
        self._pending: Pending | None = None  # the last step, where a GPU may still be at it

    def __call__(self, state: dict[str, Any] | None) -> None:
        if state:
            self._restore(state)
            state.clear()  # else its tensors would stay beside those of the run
            print(f"going on in {self.folder}: {self._place()}")
        images = self.optim.epochs * len(self.run.splits.train)
        done = (self.sofar.epoch - 1) * len(self.run.splits.train) + self.sofar.images
        if done < images and duration.is_worth_saying(self.run):
            print(duration.predict(self.run, done).describe(), flush=True)
        with (
            Progress("training", images, " images", done, quiet=not distributed.is_main_process()) as progress,
            stopping() as asked,
        ):
            while self.sofar.epoch <= self.optim.epochs:
                self._epoch(progress, asked)
        rates, meter = self.sofar.rates[WARMUP_STEPS:], self.meter
        if rates:
            self.known.images_per_second = statistics.median(rates)
        if meter and meter.memory:
            measured = meter.memory.as_dict()
            if cache := self.run.cache:  # the forward passes that fill it count as well
                measured["peak_mib"] = round(max(meter.memory.peak_mib, cache.peak_mib or 0.0), 2)
            self.known.measured(measured)
        if self.run.config.test:
            distributed.barrier()  # the first one may still be writing
            checkpoints.load(self.folder, self.run.model, self.run.weights)
            scores = accuracy(self.run, self.run.loader("test"))
            self.known.tested(scores)

    def _place(self) -> str:
        """Returns in words what comes next."""
        at, steps = self.sofar, len(self.loader)
        if at.epoch > self.optim.epochs:
            return "every epoch is done"
        return f"epoch {at.epoch}, {f'step {at.step + 1} of {steps}' if at.step < steps else 'validation'}"

    def _epoch(self, progress: Progress, asked: Callable[[], bool]) -> None:
        """Trains the rest of an epoch, validates, writes a line of metrics and saves a state.

        Ends early when it is asked to stop.
        """
        config, at, epoch, rank = self.run.config, self.sofar, self.sofar.epoch, distributed.rank_and_world_size()[0]
        train_mode(self.run.model)
        self.loader.epoch, self.loader.skip = epoch, at.step
        begun, saved = time.perf_counter() - at.seconds, time.monotonic()
        for images, targets in guarded(self.loader, asked):
            # Dropout and mixing are f(seed, epoch, step), and others in each process that shares a batch.
            torch.manual_seed(data.mix(config.seed, epoch, at.step, *([rank] if rank else [])))
            due = time.monotonic() - saved > 60 * config.save_minutes
            stop, save = self._train(images, targets, asked, due)
            del images, targets  # nothing of a step is alive when the next begins
            mean = f"{at.loss / at.images:.3f}" if at.images else "..."
            progress.add(self.loader.size(at.step - 1), epoch=f"{epoch}/{self.optim.epochs}", loss=mean)
            at.seconds = time.perf_counter() - begun
            if stop or save or (config.save_steps and at.step % config.save_steps == 0):
                self._catch_up()
                self._save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
        self._catch_up()
        self.step.release()
        try:
            scores = accuracy(self.run, self.validation, asked)
        except KeyboardInterrupt:
            self._save()
            raise
        if (found := [scores[chosen_by(self.run)] or 0.0, -scores["loss"]]) > at.best:
            at.best = found
            self.known.validated(scores, epoch)
            if distributed.is_main_process():
                state = checkpoints.trainable_state(self.run.model)
                checkpoints.save(self.folder, state, self.step.fitted, self.run.weights)
        line = {
            "epoch": epoch,
            "train_loss": at.loss / at.images,  # with auxiliary heads the mean of all
            "val_loss": scores["loss"],
            **{f"val_{name}": scores[name] for name in ("top1", "balanced", "map") if scores[name] is not None},
            "lr": at.lr,
            "seconds": time.perf_counter() - begun,
        }
        self.sofar = TrainState(epoch + 1, rates=at.rates, lines=[*at.lines, json.dumps(line) + "\n"], best=at.best)
        if distributed.is_main_process():
            files.atomic_write(self.folder / "metrics.jsonl", "".join(self.sofar.lines))
        self._save()
        progress.note(f"epoch {epoch}/{self.optim.epochs}: loss {line['train_loss']:.3f}, val {describe(scores)}")
        for key in line.keys() - {"epoch"} if self.board else ():
            self.board.add_scalar(key, line[key], epoch)

    def _train(self, images: Tensor, targets: Tensor, asked: Callable[[], bool], due: bool) -> tuple[bool, bool]:
        """Takes one step and measures it.

        Returns whether to stop behind it and whether to save, each in all processes or in none.
        """
        at, device, meter = self.sofar, self.run.device, self.meter
        count, at.lr = self.loader.size(at.step), self.optimizer.param_groups[0]["lr"]
        pending = Pending(device, at.step + 1, count)
        if meter:
            meter.step_begins()
        images, targets = sent(images, device), sent(targets, device)
        if not stays_in_pixels(self.optim):  # here, where no copy stays beside it
            images, targets = self.mix(self.step.normalised(images), targets)
            images = self.step.prepared(images)
        after = [meter.after_forward] if meter else []
        loss = self.step(self.run.trained, self.optimizer, images, targets, *after, of=count)
        pending.ends(loss)
        if meter:
            meter.step_ends()
        if at.epoch == 1 and at.step == 0:
            self._warn_of_idle()
        self.schedule.step()
        at.step += 1
        before, self._pending = (self._pending, pending) if pending.is_late else (pending, None)
        stops, saves = self._count(before, asked(), due and distributed.is_main_process())
        steps = (at.epoch - 1) * len(self.loader) + at.step - 1
        if distributed.rank_and_world_size()[1] > 1 and steps <= LOOKS[-1]:  # the first one's codes, in all processes
            self.step.calibration = distributed.broadcast(lambda: self.step.calibration)
        return stops > 0, saves > 0

    def _warn_of_idle(self) -> None:
        """Warns of trained tensors that nothing trains, such as those of a side network whose output nobody reads."""
        moved = {id(p) for p in self.step.with_gradient}
        trained = [(name, p) for name, p in self.run.model.named_parameters() if p.requires_grad]
        if (idle := [name for name, p in trained if id(p) not in moved]) and distributed.is_main_process():
            print(
                f"s2a: {len(idle)} of {len(trained)} trained tensors have no gradient in the first step, and stay as"
                f" they are: {listed(idle, 3)}",
                file=sys.stderr,
            )

    def _count(self, step: Pending | None, *flags: bool) -> list[float]:
        """Adds a step's figures, those of all processes, to those so far.

        Returns how many of the processes raise each flag.
        """
        at, (loss, seconds) = self.sofar, step.read() if step else (0.0, 0.0)
        loss, *raised = distributed.all_reduce_sum(loss, *flags)
        if step and not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} in epoch {at.epoch}, step {step.number}: lower optim.lr={self.optim.lr:g}"
            )
        if step:
            at.rates.append(step.images / seconds)
            at.loss, at.images = at.loss + loss * step.images, at.images + step.images
        return raised

    def _catch_up(self) -> None:
        """Counts the last step."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._count(pending)

    def _save(self) -> None:
        if distributed.is_main_process():
            kept = {
                "content": self.run.content,
                "accuracy": self.known.accuracy,
                "sofar": vars(self.sofar),
                "model": checkpoints.trainable_state(self.run.model),
                "calibration": self.step.calibration,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.step.scaler.state_dict(),
            }
            checkpoints.save_state(self.folder, kept)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            checkpoints.restore(self.run.model, state["model"])
            self.step.calibration = state["calibration"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step.scaler.load_state_dict(state["scaler"])
            self.known.accuracy = record.NO_ACCURACY | state["accuracy"]
            self.sofar = TrainState(**state["sofar"])
        except Exception as error:  # torch and Python raise kinds of their own for what is no such state
            raise checkpoints.damaged(self.folder / checkpoints.STATE, first_line(error)) from None
        if distributed.is_main_process():
            files.atomic_write(self.folder / "metrics.jsonl", "".join(self.sofar.lines))


def lr_factor(optim: DictConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Returns step -> share of the learning rate: linear warm-up, then constant or a cosine to zero."""
    total, warmup = optim.epochs * steps_per_epoch, optim.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if optim.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def mixing(optim: DictConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns mixup and cutmix on a batch; with both, one of them at random. Without, the batch stays as it is."""
    kinds = [
        kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, optim.mixup), (v2.CutMix, optim.cutmix)) if a
    ]
    return v2.RandomChoice(kinds) if kinds else lambda images, targets: (images, targets)
