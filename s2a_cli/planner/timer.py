"""Times forward and backward passes under candidates' settings."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from s2a_cli.common.progress import Progress
from s2a_cli.config.settings import replaced
from s2a_cli.methods import Attachment
from s2a_cli.planner.candidates import Candidate
from s2a_cli.training.cuda_graphs import PassGraphs, own_stream
from s2a_cli.training.run import OUT_OF_MEMORY
from s2a_cli.training.step import Batch, Step, moving_norms, train_mode

REPLAYS = 3  # of a graph that are timed


class Timer:
    """Times forward and backward passes of a run under candidates' settings, and leaves its model as it was.

    batch: images [B, 3, H, W], or what is kept of them, and targets, on any device; taken again where a micro-batch is
    larger. These and the criterion are as Step takes them. trained: what they go through, the model or a part of it.
    blocks: those that run, in order. passed: of these, those that a gradient passes; a mode changes nothing in others.
    """

    def __init__(
        self,
        config: DictConfig,
        attached: Attachment,
        batch: tuple[Batch, Tensor],
        device: torch.device,
        progress: Progress,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.config, self.attached, self.device, self.progress = config, attached, device, progress
        self.criterion = criterion
        self.images, self.targets = batch
        cached = bool(config.dataset.cache)
        self.trained, self.blocks = attached.trained(cached), attached.running_blocks(cached)
        self.passed = attached.passed_blocks()
        self._steps: dict[Candidate, Step] = {}
        self._replays: dict[tuple[Candidate, int], float] = {}  # seconds, with CUDA graphs
        self._norms = {
            norm: {name: t.clone() for name, t in norm.named_buffers()} for norm in moving_norms(attached.model)
        }
        train_mode(attached.model)

    def close(self) -> None:
        """Puts back the running statistics of BatchNorms that train."""
        for norm, buffers in self._norms.items():
            for name, tensor in norm.named_buffers():
                tensor.copy_(buffers[name])

    def step(self, candidate: Candidate) -> Step:
        """Returns the step of a candidate; the same one each time, so that codes are fitted once."""
        if candidate not in self._steps:
            changed = replaced(self.config, {"quant": asdict(candidate.quant)})
            self._steps[candidate] = Step(changed, self.device, self.attached, self.criterion)
        return self._steps[candidate]

    def take(self, count: int, start: int = 0) -> tuple[Batch, Tensor]:
        """Returns `count` images and targets on the device."""
        index = torch.arange(start, start + count) % len(self.images)
        return self.images[index].to(self.device), self.targets[index].to(self.device)

    def __call__(self, candidate: Candidate, images: int) -> float | None:
        """Returns the seconds of one micro-batch of so many images; None where the device has not the memory.

        With CUDA graphs these are the seconds of a replay, which are measured once: no host disturbs them.
        """
        if seconds := self._replays.get((candidate, images)):
            return seconds
        batch, step, model = self.take(images), self.step(candidate), self.trained
        about = f"{candidate.mode.about}, {images} at a time"
        if (graphs := step.graphs) is None:
            return self.seconds(lambda: step.accumulate(model, *batch), about)

        def replayed() -> float:
            with own_stream(self.device):
                step.accumulate(model, *batch)
                return self._replayed(step, graphs, *batch)

        if seconds := self._in_memory(replayed, about):
            self._replays[candidate, images] = seconds
        return seconds

    def seconds(self, run: Callable[[], object], about: str) -> float | None:
        """Returns the seconds of run(), which may leave gradients; None where the device has not the memory.

        about: what it is, for the progress.
        """
        return self._in_memory(lambda: self._seconds(run), about)

    def _in_memory(self, run: Callable[[], float], about: str) -> float | None:
        """Returns run(); None where the device has not the memory. Leaves no gradients."""
        try:
            return run()
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        finally:
            self.attached.model.zero_grad(set_to_none=True)
            self.progress.add(1, at=about)
        torch.cuda.empty_cache()  # once nothing holds the graph; does nothing without CUDA
        return None

    def _seconds(self, run: Callable[[], object]) -> float:
        """Returns the seconds of run(). On a CPU with one thread those that it computes: others may share its core."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self._wait()
        begun = clock()
        run()
        self._wait()
        return clock() - begun

    def _replayed(self, step: Step, graphs: PassGraphs, images: Batch, targets: Tensor) -> float:
        """Returns the seconds in which the pass that has just run is replayed as a graph."""
        run = functools.partial(step.accumulate, self.trained)
        with step.as_fitted():
            for _ in range(2):  # for the first time it is only noted that it has run
                graphs(run, images, targets, 1.0, ready=True)
            seconds = [self._seconds(lambda: graphs(run, images, targets, 1.0, ready=True)) for _ in range(REPLAYS)]
        graphs.clear()
        return min(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def shares(self, images: int) -> list[float]:
        """Returns what share each of the model's blocks has in the time of all forward passes of `passed`.

        Of no block there is one share of 1.
        """
        blocks = self.passed
        if not self.attached.blocks:
            return [1.0]
        seconds, begun = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)

        def begins(module: nn.Module, args: tuple) -> None:
            self._wait()
            begun[module] = time.perf_counter()

        def ends(module: nn.Module, args: tuple, output: object) -> None:
            self._wait()
            seconds[module] += time.perf_counter() - begun[module]

        hooks = [block.register_forward_pre_hook(begins) for block in blocks]
        hooks += [block.register_forward_hook(ends) for block in blocks]
        try:
            with torch.no_grad():
                self.step(Candidate(1)).logits(self.trained, self.take(images)[0])
        finally:
            for hook in hooks:
                hook.remove()
        whole = sum(seconds.values()) or 1.0
        return [seconds.get(block, 0.0) / whole for block in self.attached.blocks]


class Timers(Mapping[str | None, Timer]):
    """Holds the timers of a run by how its weights are stored, and makes them when they are asked for.

    The model of the one that was asked for last alone is on the device, which may not have room for two; the others are
    in the host's memory, and come back when they are asked for again.
    """

    def __init__(self, make: Callable[[str | None], Timer]):
        self._make = make
        self._made: dict[str | None, Timer] = {}
        self._there: Timer | None = None
        self._stack = ExitStack()

    def __getitem__(self, weights: str | None) -> Timer:
        if self._there is not None:
            if self._there is self._made.get(weights):
                return self._there
            self._there.trained.to("cpu")
            self._there = None
            torch.cuda.empty_cache()  # does nothing without CUDA
        if weights not in self._made:
            self._made[weights] = self._stack.enter_context(closing(self._make(weights)))
        timer = self._made[weights]
        timer.trained.to(timer.device)
        self._there = timer
        return timer

    def __iter__(self) -> Iterator[str | None]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def close(self) -> None:
        """Leaves all models as they were found, but for where they are."""
        self._stack.close()
