"""Predicts how long a run takes where there is no GPU, from a moment of its own training, and what would be faster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from s2a_cli import backbones, data
from s2a_cli.common import distributed
from s2a_cli.common.dataless import Dataless
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import counted, duration
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.config.settings import merge
from s2a_cli.data.batches import default_workers
from s2a_cli.memory.predict import dataless_tensors
from s2a_cli.training import checkpoints
from s2a_cli.training.step import Step, train_mode

if TYPE_CHECKING:
    from s2a_cli.training.run import Run

FEW = 2  # images of the first step that is measured
MOMENT, PATIENCE = 1.0, 3.0  # seconds of the last one, and of all
SHARE = 0.05  # of what the run seems to take: where that is less, all take no longer
LONG = 180.0  # seconds from which on it is said what would be faster
GAIN = 0.6  # share of the time that is worth saying
SMALLER = {"backbone": "backbone=vit_t", "images": "backbone.image_size=112"}


@dataclass(frozen=True)
class Pace:
    """Seconds that an image takes in a batch of the run: to load, to train on, and to classify."""

    load: float  # beside the training
    train: float
    classify: float
    images: int  # that were measured

    def scaled(self, share: float) -> Pace:
        """Returns the pace of a model that takes `share` times as many operations."""
        return replace(self, train=self.train * share, classify=self.classify * share)


@dataclass(frozen=True)
class Duration:
    """A predicted time in seconds, and (words of the command line, seconds with them) of what would be faster."""

    seconds: float
    what: str  # that takes it
    pace: Pace
    faster: list[tuple[str, float]]

    def describe(self) -> str:
        """Returns a line or two: how long, and what would be faster."""
        said = (
            f"time: about {duration(self.seconds)} on this CPU for {self.what}"
            f" ({self.pace.train + self.pace.load:.2g} s an image, measured on {self.pace.images})"
        )
        others = "; ".join(f"{words} about {duration(seconds)}" for words, seconds in self.faster)
        return f"{said}\n  faster, at another accuracy: {others}" if others else said


def is_worth_saying(run: Run) -> bool:
    """Tells whether a run is one of hours perhaps, and can be measured: on a CPU, alone, by the whole model."""
    alone = distributed.rank_and_world_size()[1] == 1
    return run.device.type == "cpu" and alone and not run.cache and not run.config.compile


def predict(run: Run, done: int = 0) -> Duration:
    """Trains on a few images for a moment, without an effect on the run, and predicts the rest of it.

    done: training images that an earlier attempt went through.
    """
    pace, splits, epochs = measure(run), run.splits, run.config.optim.epochs
    seconds = total(pace, splits, epochs * len(splits.train) - done, run.config.test)
    what = f"{'what is left of ' if done else ''}{counted(epochs, 'epoch')}"
    return Duration(seconds, what, pace, faster(run, pace, seconds) if seconds > LONG else [])


def total(pace: Pace, splits: data.Splits, images: int, test: bool = True) -> float:
    """Returns the seconds that training on so many images takes, with the validation after each epoch and the test."""
    judged = round(images / len(splits.train) * len(splits.val)) + test * len(splits.test)
    return images * (pace.train + pace.load) + judged * (pace.classify + pace.load)


def measure(run: Run) -> Pace:
    """Returns the pace of a run on this machine; what it trains and its random numbers stay as they are.

    Steps double in size until one takes a MOMENT and all of them PATIENCE, or one is as large as those of the run: what
    a step takes in itself then counts as little as it will. A short run is not kept waiting for so long.
    """
    config, model = run.config, run.model
    images_of_run = config.optim.epochs * len(run.splits.train)
    most = min(config.optim.micro_batch or config.optim.batch_size, config.optim.batch_size, len(run.splits.train))
    before, step = checkpoints.trainable_state(model), Step(config, run.device, run.attached, run.criterion())
    with torch.random.fork_rng(devices=[]):
        images, targets, load = _few(run)
        train_mode(model)
        count = min(len(images), most)
        batch = images[:count], targets[:count]
        step.accumulate(model, *batch)  # allocates, and fits codes
        took = spent = _timed(step.accumulate, model, *batch)
        while count < most and (took < MOMENT or spent < PATIENCE) and spent < SHARE * took / count * images_of_run:
            count = min(2 * count, most)
            repeats = -(-count // len(images))
            batch = torch.cat([images] * repeats)[:count], torch.cat([targets] * repeats)[:count]
            took = _timed(step.accumulate, model, *batch)
            spent += took
        model.eval()
        with torch.no_grad():
            classify = min(took, _timed(step.logits, model, batch[0])) / count
    checkpoints.restore(model, before)
    model.zero_grad(set_to_none=True)
    train = took / count
    return Pace(_left(run, load, train), train, classify, count)


def _few(run: Run) -> tuple[Tensor, Tensor, float]:
    """Returns a few training images [B, 3, H, W] with labels [B], and the seconds that one took to load."""
    split = run.splits.train.subset(range(min(FEW, len(run.splits.train))))
    transform = data.build_transform(run.backbone.image, run.config.dataset, train=True)
    start = time.perf_counter()
    images, targets = next(iter(data.loader(split, transform, len(split), workers=0)))
    return images, targets, (time.perf_counter() - start) / len(split)


def _left(run: Run, load: float, train: float) -> float:
    """Returns the seconds that loading an image adds to training on it: none, where there are cores beside it."""
    workers = default_workers(run.splits.train) if run.config.workers is None else run.config.workers
    cores = os.cpu_count() or 1
    if not workers:
        return load
    if (beside := min(workers, cores - torch.get_num_threads())) > 0:
        return max(0.0, load / beside - train)
    return load / cores


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def faster(run: Run, pace: Pace, seconds: float) -> list[tuple[str, float]]:
    """Returns what would be faster than `seconds`, by the operations that it takes."""
    config, splits, classes = run.config, run.splits, len(run.splits.classes)
    found = []
    if not config.dataset.cache:
        once = 2 * len(splits.train) + len(splits.val) + len(splits.test)  # each image, and its mirror image
        found.append(("method=side dataset.cache=features dataset.scale=null", once * (pace.classify + pace.load)))
    now = operations(config.backbone, classes)
    tried: dict[str, Any] = {SMALLER["images"]: merge(config.backbone, {"image_size": 112})}
    if not config.backbone.checkpoint:  # whose file is of this backbone
        tried[SMALLER["backbone"]] = compose([SMALLER["backbone"]]).backbone
    for words, backbone in tried.items():
        try:
            share = operations(backbone, classes) / now
        except UserError:  # a backbone that takes one size only
            continue
        loading = pace.load / (pace.train + pace.load)
        found.append((words, seconds * (share * (1 - loading) + loading)))
    return sorted([(words, one) for words, one in found if one < GAIN * seconds], key=lambda pair: pair[1])


def operations(config: BackboneConfig, classes: int) -> int:
    """Returns the floating-point operations of one image's forward pass, counted without weights or data."""
    backbone = backbones.build(config, classes, meta=True)
    model, size = backbone.model.eval(), backbone.image.size
    with Dataless(), dataless_tensors(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="cpu"))
    return counter.get_total_flops()


def image_size(config: BackboneConfig, classes: int) -> int:
    """Returns the pixels of a side of a backbone's images. Raises UserError for a size that it does not take."""
    return backbones.build(config, classes, meta=True).image.size
