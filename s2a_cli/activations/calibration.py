"""What the codes of a run are fitted to: each layer's own inputs, seen once, in its first forward pass.

- pointwise functions: the levels that are best for a histogram of the layer's inputs;
- softmax maps: likewise, for probabilities divided by the largest of their group, weighted by its square;
- normalised activations and inputs of blocks and layers: a shift and a factor for each channel. Residual streams of ViTs have
  channels a hundred times larger than the rest, and with means far from 0; a group that holds one would be coded as
  coarsely as that channel. Shifted and divided, all channels of a group are alike.

A layer is known by its site, see `ActivationMode.site`. All is deterministic, needs no second pass, and is part of a
run's state. Sums and levels are found on the CPU: two small copies a layer, once a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from s2a_cli.activations import levels
from s2a_cli.config import QuantConfig
from s2a_cli.memory.hollow import is_hollow

SAMPLE = 1 << 16  # elements of a layer's input that a histogram is made of
ROWS = 1 << 18  # elements that the shifts and factors are made of
LEAST = 0.1  # of the median factor: a channel that was constant may change later


class Calibration:
    """The fitted levels and channels of a run by site, and its count of random draws."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.is_stochastic = config.rounding == "stochastic"
        self._found: dict[str, Tensor] = {}  # as in a checkpoint: levels [2**bits] or channels [2, width], on the CPU
        self._ready: dict[str, levels.Table | Tensor] = {}  # made of these, where they are used
        self._traced: dict[str, levels.Table | Tensor] = {}  # their stand-ins in a prediction or a trace
        self._is_paused = False
        self._draws, self._origin = 0, torch.initial_seed()

    def seed(self) -> int | None:
        """The seed of the next stochastic rounding; None where codes are the nearest."""
        if not self.is_stochastic:
            return None
        self._draws += 1
        return (self._origin * 6364136223846793005 + self._draws * 1442695040888963407) % 2**62

    def pointwise(
        self, site: str, function: Callable[..., Tensor], parameters: dict, bits: int, x: Tensor
    ) -> levels.Table:
        """The table of `function` for inputs like x."""
        if ready := self._is_ready(site, x):
            return ready
        known = self._known(site, x, lambda: _histogram(x))
        if known is None:
            return self._stand_in(site, levels.pointwise(function, parameters, bits, x, self.is_stochastic), x)
        slope = functools.partial(function, **parameters)
        return self._fit(site, known, functools.partial(levels.derivative_table, slope, bits), x)

    def unit(self, site: str, p: Tensor, bits: int) -> levels.Table:
        """The table of softmax maps like p [..., keys]."""
        group = self.config.group
        if ready := self._is_ready(site, p):
            return ready
        known = self._known(site, p, lambda: _shares(p, group))
        if known is None:
            return self._stand_in(site, levels.unit(bits, p, self.is_stochastic), p)
        return self._fit(site, known, functools.partial(levels.unit_table, bits), p)

    def _fit(self, site: str, known: Tensor, make: Callable[..., levels.Table], like: Tensor) -> levels.Table:
        """A table from a histogram over its bins, or from levels that were found before."""
        with torch.no_grad():
            if site in self._found:
                table = make(stochastic=self.is_stochastic, levels=known)
            else:
                table = make(histogram=known, stochastic=self.is_stochastic)
        self._found[site], self._ready[site] = table.levels, table.to(like.device)
        return self._ready[site]

    def channels(self, site: str, x: Tensor, change: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor | None:
        """A shift and a factor for each place of the rows of x [..., width], float32 [2, width]; None: as they are.

        change: gives what is coded from rows [n, width] of x, where that is not x itself.
        """
        if (ready := self._is_ready(site, x)) is not None:
            return ready
        if is_hollow(x) and self.config.calibrate and not self._is_paused:
            self._traced[site] = x.new_empty((2, x.shape[-1]), dtype=torch.float32)
            return self._traced[site]
        known = self._known(site, x, lambda: _channels(change(_rows(x))))
        if known is None:
            return None
        self._found[site] = known
        self._ready[site] = known.to(x.device)
        return self._ready[site]

    def _is_ready(self, site: str, x: Tensor) -> levels.Table | Tensor | None:
        """What serves inputs like x at this site, if it was made before."""
        ready = (self._traced if is_hollow(x) else self._ready).get(site)
        tensor = ready.levels if isinstance(ready, levels.Table) else ready
        fits = tensor is not None and tensor.device == x.device and isinstance(tensor, FakeTensor) == isinstance(x, FakeTensor)
        return ready if fits else None

    def _stand_in(self, site: str, table: levels.Table, x: Tensor) -> levels.Table:
        """A fixed table; for inputs without data in a tensor of the site's own, as a fitted one would be."""
        if is_hollow(x) and self.config.calibrate and not self._is_paused:
            self._traced[site] = table = table.hollow(x)
        return table

    def _known(self, site: str, x: Tensor, find: Callable[[], Tensor]) -> Tensor | None:
        """What was found at this site, now or before; None where nothing is to be."""
        if not self.config.calibrate or is_hollow(x) or x.numel() == 0:
            return None
        if site in self._found:
            return self._found[site]
        with torch.no_grad():
            return None if self._is_paused else find().cpu()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is fitted within: what runs there is not the run's data."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on as it was: {site: levels or channels} and the count of draws."""
        return {**self._found, "draws": torch.tensor([self._origin, self._draws])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave."""
        self._found = {site: tensor for site, tensor in state.items() if site != "draws"}
        self._ready = {}
        self._origin, self._draws = state["draws"].tolist()


def _histogram(x: Tensor) -> Tensor:
    """How many of a sample of x lie in each bin of a pointwise table."""
    sample = _rows(x.unsqueeze(-1), SAMPLE).nan_to_num_(0, 0, 0).clamp_(-levels.RANGE, levels.RANGE)
    return torch.histc(sample.cpu(), levels.POINTWISE_BINS, -levels.RANGE, levels.RANGE)


def _shares(p: Tensor, group: int) -> Tensor:
    """The bins of a unit table, by the square of the scale of what lies in them, for a sample of p [..., keys]."""
    rows = _rows(p).cpu()
    group = min(group, rows.shape[1])
    shares = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).view(len(rows), -1, group)
    scale = shares.amax(-1, keepdim=True)
    bins = (shares / scale).nan_to_num_(0, 0, 0).mul_(levels.GROUP_BINS).int().clamp_(0, levels.GROUP_BINS - 1)
    weight = scale.nan_to_num_(0, 0, 0).square_().expand_as(shares)
    return torch.bincount(bins.flatten(), weight.flatten(), levels.GROUP_BINS)


def _rows(x: Tensor, elements: int = ROWS) -> Tensor:
    """Some rows of x [..., width], from all over it: float32 [n, width], n * width at most `elements`."""
    if x.dim() == 1:
        return x[None].float()
    count, total = max(1, elements // x.shape[-1]), x.numel() // x.shape[-1]
    step = -(-total // count) | 1  # odd, so that rows of a power of two meet all places of it
    chosen = torch.arange(0, total, step, device=x.device)
    return x[torch.unravel_index(chosen, x.shape[:-1])].float()


def _channels(rows: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    factor = deviation.clamp_min(LEAST * deviation.median())
    factor = torch.where(factor > 0, factor, 1.0)
    return torch.stack([mean, factor]).nan_to_num_(0, 1, 1)
