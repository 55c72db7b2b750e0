"""Tables of levels: what a b-bit code of a derivative, or of a normalised value, stands for.

A table cuts the input into fine bins and gives each bin a code, and each code a level. The level is the mean over all
inputs with that code, so that rounding has no bias; which bins share a code is chosen by dynamic programming, exactly,
to minimise the mean square error over a distribution of inputs. Bins with one code need not be neighbours: GELU' takes
most values between -0.129 and 0 twice, and one level serves both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

RANGE = 16.0  # pointwise inputs beyond +-RANGE share the outermost bins: f' is constant there
POINTWISE_BINS = 1 << 14
GROUP_BINS = 1 << 12
_POINTS = 512  # distinct values the dynamic programme sees


@dataclass(frozen=True)
class Table:
    """`code = bins[floor((x - low) / (high - low) * len(bins))]`, clamped, stands for `levels[code]`."""

    bits: int
    low: float
    high: float
    bins: Tensor  # uint8 [power of two]
    levels: Tensor  # float32 (or, for slopes, float64) [2**bits]

    def to(self, device: torch.device) -> Table:
        return replace(self, bins=self.bins.to(device), levels=self.levels.to(device))

    def fake(self, like: FakeTensor) -> Table:
        """The shapes of this table, for a trace."""
        bins, levels = (like.new_empty(t.shape, dtype=t.dtype) for t in (self.bins, self.levels))
        return replace(self, bins=bins, levels=levels)


def optimal_levels(values: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The best 2**bits levels for `values` with these weights, and the code of each value.

    values, weights: float64 [n]. Returns (levels float64 [2**bits] ascending, codes uint8 [n]). Each level is the
    weighted mean of its values.
    """
    points, mass = _condense(values, weights)
    borders = _segment(points, mass, min(2**bits, points.numel()))
    levels = _means(torch.bucketize(torch.arange(points.numel()), borders, right=True), points, mass, 2**bits)
    for _ in range(4):  # Lloyd's steps on the values themselves undo the condensing; each keeps or lowers the error
        codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        levels = _means(codes, values, weights, 2**bits)
    return levels, torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _condense(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """At most _POINTS ascending points with the mass of the values around them."""
    low, high = values.min(), values.max()
    index = ((values - low) / (high - low).clamp_min(1e-300) * (_POINTS - 1)).round().long()
    mass = torch.zeros(_POINTS, dtype=torch.float64).index_add_(0, index, weights)
    total = torch.zeros(_POINTS, dtype=torch.float64).index_add_(0, index, weights * values)
    held = mass > 0
    return total[held] / mass[held], mass[held]


def _segment(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """Borders (indices [count - 1]) of the `count` runs of ascending points with the least square error."""
    zero = torch.zeros(1, dtype=torch.float64)
    m0, m1, m2 = (torch.cat([zero, (mass * points**k).cumsum(0)]) for k in range(3))
    inside = (m0[None, :] - m0[:, None]).clamp_min(1e-300)
    cost = (m2[None, :] - m2[:, None]) - (m1[None, :] - m1[:, None]) ** 2 / inside  # [i, j]: one run of points i..j-1
    cost = cost.clamp_min(0).masked_fill(torch.ones_like(cost).tril().bool(), math.inf)
    best, last = cost[0].clone(), []
    for _ in range(count - 1):
        best, index = (best[:, None] + cost).min(0)
        last.append(index)
    borders, end = [], points.numel()
    for index in reversed(last):
        end = int(index[end])
        borders.append(end)
    return torch.tensor(borders[::-1], dtype=torch.long)


def _means(codes: Tensor, values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Weighted mean of the values of each code, ascending; a code without values takes the level below it."""
    mass = torch.zeros(count, dtype=torch.float64).index_add_(0, codes.long(), weights)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, codes.long(), weights * values)
    means = torch.where(mass > 0, total / mass, -math.inf)
    means[0] = torch.where(mass[0] > 0, means[0], values.min())
    return means.cummax(0).values


def pointwise_weights(x: Tensor) -> Tensor:
    """Density, up to a factor, of the inputs that the fixed tables are made for: normal around -1, and a wide floor.

    GELU's inputs in a pretrained ViT have means from -0.6 (first block) to -2 (last) and deviations near 1.4.
    """
    return torch.exp(-(((x + 1) / 1.4) ** 2) / 2) + 1e-3 * torch.exp(-((x / 4) ** 2) / 2)


def derivative_table(
    function: Callable[[Tensor], Tensor], bits: int, weights: Callable[[Tensor], Tensor] = pointwise_weights
) -> Table:
    """Levels of the derivative of an elementwise `function`, which is called once, on float64 inputs.

    weights: density of the inputs at given points, up to a factor.
    """
    edges = torch.linspace(-RANGE, RANGE, POINTWISE_BINS + 1, dtype=torch.float64)
    values = function(edges).diff() / edges.diff()  # the mean of f' over each bin
    levels, codes = optimal_levels(values, weights((edges[1:] + edges[:-1]) / 2), bits)
    return Table(bits, -RANGE, RANGE, codes, levels.float())


def signed_table(bits: int, group: int) -> Table:
    """Levels for a value divided by the one of the largest magnitude in its group, sign included.

    Two levels are fixed at 0 and 1: where one channel is a hundred times larger than its group (residual streams of
    ViTs have such), it is kept exactly, and the others not as something larger than they are. The other levels are best
    for a normal variable in groups of `group`, its error weighted by the group's magnitude squared, mixed with a
    sharper peak for groups with such outliers.
    """
    u = _centres(-1)
    largest = torch.linspace(0.02, 8, 400, dtype=torch.float64)[:, None]
    inside = torch.erf(largest / math.sqrt(2))
    density = torch.exp(group * torch.log(inside) - largest**2 / 2 + 3 * torch.log(largest)) / inside**2
    normal = (density * torch.exp(-((largest * u) ** 2) / 2)).sum(0)
    peak = torch.exp(-u.abs() / 0.1)
    weights = normal / normal.sum() + peak / peak.sum()
    weights[[GROUP_BINS // 2 - 1, GROUP_BINS // 2, -1]] = 100
    levels, codes = optimal_levels(u, weights, bits)
    return Table(bits, -1.0, 1.0, codes, levels.float())


def unit_table(bits: int) -> Table:
    """Levels for a value in [0, 1], a probability divided by the largest in its group: a density of 1 / (u + 0.01)."""
    u = _centres(0)
    levels, codes = optimal_levels(u, 1 / (u + 0.01), bits)
    return Table(bits, 0.0, 1.0, codes, levels.float())


def slopes_table(outside: float, inside: float, dtype: torch.dtype) -> Table:
    """The two slopes of a function of straight pieces; its codes come from comparisons, not bins."""
    return Table(1, 0.0, 0.0, torch.empty(0, dtype=torch.uint8), torch.tensor([outside, inside], dtype=dtype))


def mask_table(p: float, dtype: torch.dtype) -> Table:
    """0 and 1 / (1 - p), rounded as stock dropout rounds its noise."""
    kept = torch.tensor([0.0, 1.0], dtype=dtype).div_(1 - p)
    return Table(1, 0.0, 0.0, torch.empty(0, dtype=torch.uint8), kept if dtype == torch.float64 else kept.float())


def _centres(low: float) -> Tensor:
    edges = torch.linspace(low, 1, GROUP_BINS + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


def pointwise(function: Callable[..., Tensor], parameters: dict, bits: int, like: Tensor) -> Table:
    """The table of an elementwise function with these keyword arguments, where `like` is."""
    return _placed(_pointwise, (function, tuple(sorted(parameters.items())), bits), like)


def slopes(outside: float, inside: float, like: Tensor) -> Table:
    """The table of a function with these two slopes, where `like` is."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return _placed(slopes_table, (outside, inside, dtype), like)


def mask(p: float, like: Tensor) -> Table:
    """The table of a dropout mask, where `like` is."""
    return _placed(mask_table, (p, like.dtype), like)


def signed(bits: int, group: int, like: Tensor) -> Table:
    """The table of normalised values in groups that share a scale, where `like` is."""
    return _placed(signed_table, (bits, group), like)


def unit(bits: int, like: Tensor) -> Table:
    """The table of softmax maps, where `like` is."""
    return _placed(unit_table, (bits,), like)


def _pointwise(function: Callable[..., Tensor], parameters: tuple, bits: int) -> Table:
    return derivative_table(functools.partial(function, **dict(parameters)), bits)


@functools.cache
def _made(make: Callable[..., Table], arguments: tuple) -> Table:
    with torch.no_grad(), _disable_current_modes():  # real, whatever is being traced
        return make(*arguments)


@functools.cache
def _on(make: Callable[..., Table], arguments: tuple, device: torch.device) -> Table:
    return _made(make, arguments).to(device)


def _placed(make: Callable[..., Table], arguments: tuple, like: Tensor) -> Table:
    if isinstance(like, FakeTensor):
        return _made(make, arguments).fake(like)
    return _on(make, arguments, like.device)
