"""Tells how long a step takes on this device, from a few micro-batches that are timed.

A step of B images in micro-batches of m takes B / m times the forward and backward pass of m images, which is timed in
stock PyTorch at several m. A mode of a block (see candidates.py) takes the same share more at every m: it is timed at
one m with all blocks in it, and divided among the blocks as their forward passes are. Stored weights are unpacked in
each pass, whatever m is. The update of the parameters is the same for all plans and left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from s2a_cli.common.progress import Progress
from s2a_cli.config.settings import merge
from s2a_cli.methods import Attachment
from s2a_cli.planner.candidates import MODES, PLAIN, WEIGHTS, Candidate, Mode
from s2a_cli.training.run import OUT_OF_MEMORY
from s2a_cli.training.step import Step, moving_norms, train_mode

SECONDS = 12.0  # for all measurements together, but for the first of each kind
MODE_IMAGES = 4  # at most, that modes are measured with
ROUNDS = 3  # in which all is measured once more, while there is time
RECOMPUTED_EXTRA = 0.35  # assumed: the share of a pass that its blocks' forward passes take
NOISE = 0.05  # of a time: a mode that is faster than stock PyTorch by less is taken to be as fast
CODED_EXTRA = 0.05  # assumed, of codes


@dataclass
class Costs:
    """Seconds of a micro-batch.

    stock: by its images, forward and backward, every block as in stock PyTorch. shares: of the blocks in the time of
    all of them. extra: what a mode takes more, as a share, with all blocks in it. weights: seconds more of each pass
    with weights stored so. assumed: nothing was measured; then only the order of two times means something.
    """

    stock: dict[int, float]
    shares: list[float]
    extra: dict[Mode, float]
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
        extra = self.extra.get(candidate.mode, 0.0) * share if candidate.blocks else 0.0
        return self._stock(images) * (1 + extra) + self.weights.get(candidate.weights or "", 0.0)

    def add_weights(self, name: str, timer: Timer) -> None:
        """Notes what a pass takes more with weights that are stored as those of the timer's model."""
        at = min(self.stock)
        seconds = min(filter(None, (timer(Candidate(at), at) for _ in range(3))), default=math.inf)
        self.weights[name] = max(0.0, seconds - self.stock[at])

    def _stock(self, images: int) -> float:
        """Interpolates the seconds an image along the logarithm of the number of images; flat outside."""
        known = sorted(self.stock)
        below, above = (
            max((n for n in known if n <= images), default=known[0]),
            min((n for n in known if n >= images), default=known[-1]),
        )
        low, high = self.stock[below] / below, self.stock[above] / above
        if below == above:
            return low * images
        part = math.log(images / below) / math.log(above / below)
        return images * (low + (high - low) * part)


def assumed(blocks: int) -> Costs:
    """Returns costs that order plans where nothing is measured: a pass costs as much as 1/8 of an image's."""
    extra = {mode: 0.0 if mode == PLAIN else RECOMPUTED_EXTRA if mode.recomputes else CODED_EXTRA for mode in MODES}
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
        """Returns the seconds of one micro-batch of so many images; None where the device has not the memory."""
        batch, step, model = self.take(images), self.step(candidate), self.attached.model
        try:
            self._wait()
            begun = time.perf_counter()
            step.accumulate(model, *batch)
            self._wait()
            return time.perf_counter() - begun
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            return None
        finally:
            model.zero_grad(set_to_none=True)
            self.progress.add(1, at=f"{candidate.mode.about}, {images} at a time")

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
) -> Costs:
    """Times micro-batches of the smaller of these sizes, which ascend, in stock PyTorch, and modes at one of them.

    fits: whether a candidate's predicted peak fits the device; others are not run. Where stock PyTorch does not fit
    with one image, its time is that of the first mode that does, less what is assumed to be computed a second time.
    """
    until, total = time.monotonic() + SECONDS, max(1, len(timer.attached.blocks))
    best: dict[tuple[Candidate, int], float] = {}

    def take(candidate: Candidate, images: int) -> float | None:
        """Returns the seconds of one micro-batch and keeps the least, nearest to what an undisturbed device does."""
        if (found := timer(candidate, images)) is not None:
            best[candidate, images] = min(found, best.get((candidate, images), found))
        return found

    stock: list[int] = []
    for images in sizes:
        # So many images take as long as all sizes before them together; modes want their part of the time, too.
        ahead = images / stock[-1] * best[Candidate(stock[-1]), stock[-1]] if stock else 0.0
        if ahead > (until - time.monotonic()) / 3 or not fits(Candidate(images)):
            break
        if not stock:
            take(Candidate(images), images)  # the first pass of a process waits for what later ones find ready
        if take(Candidate(images), images) is None:
            break
        stock.append(images)
    at = max((images for images in stock if images <= MODE_IMAGES), default=min(sizes))
    kept: list[Mode] = []
    for mode in modes:
        candidate = Candidate(at, mode, total, total)
        late = kept and time.monotonic() > until
        # What keeps less than stock PyTorch fits where that does. The first pass fits codes to what it sees.
        if mode != PLAIN and not late and (stock or fits(candidate)) and take(candidate, at) and take(candidate, at):
            kept.append(mode)
    shares = timer.shares(at)
    for _ in range(ROUNDS):
        for candidate, images in list(best):
            if time.monotonic() + best[candidate, images] < until:
                take(candidate, images)
    found = {images: best[Candidate(images), images] for images in stock}
    if not found and kept:
        found[at] = best[Candidate(at, kept[0], total, total), at] / (1 + RECOMPUTED_EXTRA)
    extra = {mode: best[Candidate(at, mode, total, total), at] / found[at] - 1 for mode in kept}
    return Costs(found or {at: float(at)}, shares, {mode: _believable(mode, share) for mode, share in extra.items()})


def _believable(mode: Mode, extra: float) -> float:
    """Returns what a mode takes more; 0 where it seems to take less, by no more than noise or against all reason."""
    return 0.0 if -NOISE < extra < 0 or (mode.recomputes and extra < 0) else extra
