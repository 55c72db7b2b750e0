"""Tells how long a step takes on this device, from what was measured of it (measure.py).

A step of B images in micro-batches of m takes B / m times the forward and backward pass of m images, which is known in
stock PyTorch at several m. What a mode of a block (see candidates.py) takes more is known with all blocks in it, at
several m as well, and divided among the blocks as their own times are: a device that small micro-batches leave idle
loses more by a second pass over them than by one over large ones. Stored weights are unpacked in each pass, whatever m
is. The update of the parameters is the same for all plans and left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from s2a_cli.planner.candidates import MODES, PLAIN, WEIGHTS, Candidate, Mode
from s2a_cli.planner.timer import Timer

RECOMPUTED_EXTRA = 0.35  # assumed: the share of a pass that its blocks' forward passes take
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
