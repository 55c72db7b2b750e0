"""Tells how long a step takes on this device, from a few micro-batches that are timed.

A step of B images in micro-batches of m takes B / m times the forward and backward pass of m images, which is timed in
stock PyTorch at several m. What a mode of a block (see candidates.py) takes more is timed with all blocks in it, at
several m as well where the device is fast, and divided among the blocks as their forward passes are: a device that
small micro-batches leave idle loses more by a second pass over them than by one over large ones. Stored weights are
unpacked in each pass, whatever m is. The update of the parameters is the same for all plans and left out.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from s2a_cli.common.progress import Progress
from s2a_cli.config.settings import merge
from s2a_cli.methods import Attachment
from s2a_cli.planner.candidates import MODES, PLAIN, WEIGHTS, Candidate, Mode
from s2a_cli.training.cuda_graphs import PassGraphs, own_stream
from s2a_cli.training.run import OUT_OF_MEMORY
from s2a_cli.training.step import Step, moving_norms, train_mode

SECONDS = 11.0  # for all measurements together, but for the first of each kind
SHORT_RUN = 0.05  # of what a run is expected to take: where that is less, measurements take no more than it
MODE_IMAGES = 4  # at most, that all modes are measured with; fewer where that would take longer than MODE_SECONDS
MODE_SECONDS = 4.0
MOST_OF_REST = 20  # a larger micro-batch of a mode is measured where it takes no more than this part of the time left
ROUNDS = 3  # in which all is measured once more, while there is time
RECOMPUTED_EXTRA = 0.35  # assumed: the share of a pass that its blocks' forward passes take
NOISE = 0.05  # of a time: a mode that is faster than stock PyTorch by less is taken to be as fast
REPLAYS = 3  # of a graph that are timed
CODED_EXTRA = 0.05  # assumed, of codes


@dataclass
class Costs:
    """Seconds of a micro-batch.

    stock: by its images, forward and backward, every block as in stock PyTorch. shares: of the blocks in the time of
    all of them. extra: what a mode takes more, as a share by the images of a micro-batch, with all blocks in it.
    weights: seconds more of each pass with weights stored so. assumed: nothing was measured; then only the order of two
    times means something.
    """

    stock: dict[int, float]
    shares: list[float]
    extra: dict[Mode, dict[int, float]]
    weights: dict[str, float] = field(default_factory=dict)
    assumed: bool = False

    def step(self, candidate: Candidate, batch: int) -> float:
        """Returns the seconds of a step of `batch` images."""
        whole, rest = divmod(batch, candidate.micro_batch)
        return whole * self.micro_batch(candidate, candidate.micro_batch) + (
            self.micro_batch(candidate, rest) if rest else 0.0
        )

    def micro_batch(self, candidate: Candidate, images: int) -> float:
        """Returns the seconds of one micro-batch of so many images."""
        share = sum(self.shares[: candidate.blocks])
        extra = self.more(candidate.mode, images) * share if candidate.blocks else 0.0
        return self._stock(images) * (1 + extra) + self.weights.get(candidate.weights or "", 0.0)

    def more(self, mode: Mode, images: int) -> float:
        """Returns what a mode takes more with all blocks in it, as a share; below 0 where it is faster."""
        return _between(self.extra[mode], images) if mode in self.extra else 0.0

    def add_weights(self, name: str, timer: Timer, fits: Callable[[Candidate], bool], least: float) -> None:
        """Notes what a pass takes more with weights that are stored as those of the timer's model.

        fits: whether a candidate's predicted peak fits. least: what it takes more at least; less than 0 is noise where
        the others are not stored in any way.
        """
        at, total = min(self.stock), len(self.shares)
        whole = [Candidate(at), *(Candidate(at, mode, total, total) for mode in self.extra)]
        candidate = next((one for one in whole if fits(replace(one, weights=name))), whole[0])
        seconds = min(filter(None, (timer(candidate, at) for _ in range(3))), default=math.inf)
        self.weights[name] = max(least, seconds - self.micro_batch(candidate, at))

    def _stock(self, images: int) -> float:
        return images * _between({size: seconds / size for size, seconds in self.stock.items()}, images)


def _between(table: dict[int, float], images: int) -> float:
    """Interpolates along the logarithm of the number of images; flat outside of what is known."""
    below = max((size for size in table if size <= images), default=min(table))
    above = min((size for size in table if size >= images), default=max(table))
    if below == above:
        return table[below]
    return table[below] + (table[above] - table[below]) * math.log(images / below) / math.log(above / below)


def assumed(blocks: int) -> Costs:
    """Returns costs that order plans where nothing is measured: a pass costs as much as 1/8 of an image's."""
    extra = {mode: {1: RECOMPUTED_EXTRA if mode.recomputes else CODED_EXTRA} for mode in MODES if mode != PLAIN}
    stock = {2**power: 2**power + 0.125 for power in range(20)}
    return Costs(stock, [1 / blocks] * blocks, extra, dict.fromkeys((w for w in WEIGHTS if w != "fp32"), 0.25), True)


class Timer:
    """Times forward and backward passes of a run under candidates' settings, and leaves its model as it was.

    batch: images [B, 3, H, W] and targets, on any device; taken again where a micro-batch is larger. These and the
    criterion are as Step takes them.
    """

    def __init__(
        self,
        config: DictConfig,
        attached: Attachment,
        batch: tuple[Tensor, Tensor],
        device: torch.device,
        progress: Progress,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.config, self.attached, self.device, self.progress = config, attached, device, progress
        self.criterion = criterion
        self.images, self.targets = batch
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
            changed = merge(self.config, {"quant": OmegaConf.structured(candidate.quant)})
            self._steps[candidate] = Step(changed, self.device, self.attached, self.criterion)
        return self._steps[candidate]

    def take(self, count: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Returns `count` images and targets on the device."""
        index = torch.arange(start, start + count) % len(self.images)
        return self.images[index].to(self.device), self.targets[index].to(self.device)

    def __call__(self, candidate: Candidate, images: int) -> float | None:
        """Returns the seconds of one micro-batch of so many images; None where the device has not the memory.

        With CUDA graphs these are the seconds of a replay, which are measured once: no host disturbs them.
        """
        if seconds := self._replays.get((candidate, images)):
            return seconds
        batch, step, model = self.take(images), self.step(candidate), self.attached.model
        try:
            if (graphs := step.graphs) is None:
                return self._seconds(lambda: step.accumulate(model, *batch))
            with own_stream(self.device):
                step.accumulate(model, *batch)
                seconds = self._replays[candidate, images] = self._replayed(step, graphs, *batch)
            return seconds
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        finally:
            model.zero_grad(set_to_none=True)
            self.progress.add(1, at=f"{candidate.mode.about}, {images} at a time")
        torch.cuda.empty_cache()  # once nothing holds the graph; does nothing without CUDA
        return None

    def _seconds(self, run: Callable[[], object]) -> float:
        self._wait()
        begun = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begun

    def _replayed(self, step: Step, graphs: PassGraphs, images: Tensor, targets: Tensor) -> float:
        """Returns the seconds in which the pass that has just run is replayed as a graph."""
        run = functools.partial(step.accumulate, self.attached.model)
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
        """Returns the shares of the blocks in the time of all their forward passes; of no block one share of 1."""
        blocks = self.attached.blocks
        if not blocks:
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
                self.step(Candidate(1)).logits(self.attached.model, self.take(images)[0])
        finally:
            for hook in hooks:
                hook.remove()
        whole = sum(seconds.values()) or 1.0
        return [seconds[block] / whole for block in blocks]


def measure(
    timer: Timer,
    sizes: list[int],
    modes: Iterable[Mode],
    fits: Callable[[Candidate], bool],
    run: float = math.inf,
) -> Costs:
    """Times micro-batches of the smaller of these sizes, which ascend, in stock PyTorch, and modes at some of them.

    fits: whether a candidate's predicted peak fits the device; others are not run. Where stock PyTorch does not fit
    with one image, its time is that of the first mode that does, less what is assumed to be computed a second time.
    run: images that the run trains on, in all its epochs.
    """
    most, spent, total = SECONDS, 0.0, max(1, len(timer.attached.blocks))
    best: dict[tuple[Candidate, int], float] = {}

    def take(candidate: Candidate, images: int) -> float | None:
        """Returns the seconds of one micro-batch and keeps the least, nearest to what an undisturbed device does."""
        nonlocal spent
        begun = time.monotonic()
        if (found := timer(candidate, images)) is not None:
            best[candidate, images] = min(found, best.get((candidate, images), found))
        spent += time.monotonic() - begun
        return found

    stock: list[int] = []
    for images in sizes:
        # So many images take as long as all sizes before them together; modes want their part of the time, too.
        ahead = images / stock[-1] * best[Candidate(stock[-1]), stock[-1]] if stock else 0.0
        if ahead > (most - spent) / 2 or not fits(Candidate(images)):
            break
        if not stock:
            take(Candidate(images), images)  # the first pass of a process waits for what later ones find ready
        if (seconds := take(Candidate(images), images)) is None:
            break
        most = min(most, SHORT_RUN * run * seconds / images)
        stock.append(images)
    modes = [mode for mode in modes if mode != PLAIN]
    few = [n for n in stock if n <= MODE_IMAGES and 2 * len(modes) * best[Candidate(n), n] <= MODE_SECONDS]
    at = max(few, default=min(sizes))
    known: dict[Mode, list[int]] = {}
    for mode in modes:
        candidate = Candidate(at, mode, total, total)
        if known and spent > most:
            break
        # What keeps less than stock PyTorch fits where that does. The first pass fits codes to what it sees.
        if (stock or fits(candidate)) and take(candidate, at) and take(candidate, at):
            known[mode] = [at]
    for mode, images in ((mode, images) for images in sizes if images > at for mode in known):
        candidate = Candidate(at, mode, total, total)
        whole = replace(candidate, micro_batch=images)
        ahead = images / at * best[candidate, at]
        if ahead < (most - spent) / MOST_OF_REST and fits(whole) and take(candidate, images):
            known[mode].append(images)
    shares = timer.shares(at)
    for _ in range(ROUNDS):
        for candidate, images in list(best):
            if spent + best[candidate, images] < most:
                take(candidate, images)
    found = {images: best[Candidate(images), images] for images in stock}
    if not found and known:
        found[at] = best[Candidate(at, next(iter(known)), total, total), at] / (1 + RECOMPUTED_EXTRA)
    costs = Costs(found or {at: float(at)}, shares, {})
    for mode, tried in known.items():
        seconds = {images: best[Candidate(at, mode, total, total), images] for images in tried}
        plain = {images: costs.micro_batch(Candidate(images), images) for images in tried}
        costs.extra[mode] = {images: _believable(mode, seconds[images] / plain[images] - 1) for images in tried}
    return costs


def _believable(mode: Mode, extra: float) -> float:
    """Returns what a mode takes more; 0 where it seems to take less, by no more than noise or against all reason."""
    return 0.0 if -NOISE < extra < 0 or (mode.recomputes and extra < 0) else extra
