"""Makes codebooks: what a b-bit code of a derivative, or of a normalised value, stands for.

A codebook cuts the input into fine bins and gives each bin a code, and each code an entry. The entry is the mean over
all inputs with that code, so that rounding has no bias. Which bins share a code is chosen by dynamic programming,
exactly, to minimise the mean square error over a distribution of inputs. Bins with one code need not be neighbours:
GELU' takes most values between -0.129 and 0 twice, and one entry serves both.

For stochastic rounding a bin has the code of the entry below its value, and the chance of the entry above, so that the
mean over draws is the value itself. Its entries reach from the least value to the largest, and dynamic programming
places them for the least variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ParamSpec
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
RANGE = 16.0  # pointwise inputs beyond +-RANGE share the outermost bins: f' is constant there
POINTWISE_BINS = 1 << 14
GROUP_BINS = 1 << 12
JUMP = 0.1  # of f' within a bin, against both sides: more than any kink or curve makes
FLOOR = 0.01  # weight of the fixed distribution beside a histogram
_FAKES: WeakKeyDictionary[FakeTensorMode, dict[tuple, Codebook]] = WeakKeyDictionary()  # codebooks of a trace
_POINTS = 512  # distinct values the dynamic programme sees


@dataclass(frozen=True)
class Codebook:
    """Maps an input to a code, and a code to the value that it stands for.

    `code = bin_codes[floor((x - low) / (high - low) * len(bin_codes))]`, clamped, stands for `entries[code]`.

    With `chances` (stochastic rounding) the code is one higher where a uniform int16 is below that of the bin.
    """

    bits: int
    low: float
    high: float
    bin_codes: Tensor  # uint8 [power of two]
    entries: Tensor  # float32 (or, for slopes, float64) [2**bits], ascending
    chances: Tensor | None = None  # int16, one a bin

    def to(self, device: torch.device, copy: bool = False) -> Codebook:
        return self._each(lambda t: t.to(device, copy=copy))

    def dataless(self, like: Tensor) -> Codebook:
        """Returns the shapes of this codebook, for a prediction or a trace."""
        return self._each(lambda t: like.new_empty(t.shape, dtype=t.dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Codebook:
        chances = None if self.chances is None else change(self.chances)
        return replace(self, bin_codes=change(self.bin_codes), entries=change(self.entries), chances=chances)


def on_host(make: Callable[P, Codebook]) -> Callable[P, Codebook]:
    """Decorates what makes a codebook: it does so on the host, whatever PyTorch's default device is."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Codebook:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return made


def fit(
    values: Tensor, weights: Tensor, bits: int, low: float, high: float, stochastic: bool, entries: Tensor | None = None
) -> Codebook:
    """Returns the codebook of bins between low and high with these values and weights, float64 [bins].

    entries: those to use; by default the best ones.
    """
    if entries is None:
        entries = spanning_entries(values, weights, bits) if stochastic else optimal_entries(values, weights, bits)
    entries = entries.double()
    if not stochastic:
        return Codebook(bits, low, high, nearest(values, entries), entries.float())
    below = torch.bucketize(values, entries[1:-1], right=True)
    chance = (values - entries[below]) / (entries[below + 1] - entries[below]).clamp_min(1e-300)
    chances = (chance * 2**16 - 2**15).round_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)
    return Codebook(bits, low, high, below.to(torch.uint8), entries.float(), chances)


def nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Returns the code (uint8) of the entry nearest to each value."""
    borders = ((entries[1:] + entries[:-1]) / 2).numpy()
    return torch.from_numpy(np.searchsorted(borders, values.numpy()).astype(np.uint8))


def optimal_entries(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Returns the 2**bits entries, float64 ascending, nearest to `values` in the weighted mean square.

    values, weights: float64 [n].

    Each entry is the weighted mean of the values nearest to it.
    """
    points, mass = _condense(values, weights)
    borders = torch.tensor(_path(_spread(points, mass), min(2**bits, points.numel())))
    entries = _means(torch.bucketize(torch.arange(points.numel()), borders, right=True), points, mass, 2**bits)
    for _ in range(4):  # Lloyd's steps on the values themselves undo the condensing; each keeps or lowers the error
        entries = _means(nearest(values, entries), values, weights, 2**bits)
    return entries


def spanning_entries(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Returns 2**bits entries, from the least value to the largest, with the least variance of stochastic rounding."""
    points, mass = _condense(values, weights)
    points[0], points[-1] = values.min(), values.max()
    steps = min(2**bits, points.numel()) - 1
    if steps < 1:  # a constant
        return points.expand(2**bits).clone()
    entries = points[[0, *_path(_variance(points, mass), steps), -1]]
    return torch.cat([entries, entries[-1:].expand(2**bits - len(entries))])


def _condense(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns at most _POINTS ascending points with the mass of the values around them."""
    low, high = values.min(), values.max()
    index = ((values - low) / (high - low).clamp_min(1e-300) * (_POINTS - 1)).round().long()
    mass = torch.zeros(_POINTS, dtype=torch.float64).index_add_(0, index, weights)
    total = torch.zeros(_POINTS, dtype=torch.float64).index_add_(0, index, weights * values)
    held = mass > 0
    return total[held] / mass[held], mass[held]


def _sums(points: Tensor, mass: Tensor) -> Iterator[np.ndarray]:
    """Yields for each power 0, 1, 2: [i, j] = sum of mass * points**power over i..j-1.

    Uses numpy, as its callers do: PyTorch would share each of these small sums among threads, which wait for each other
    for many times as long wherever another process needs a core.
    """
    x, weights = points.numpy(), mass.numpy()
    for power in range(3):
        total = np.concatenate([[0.0], np.cumsum(weights * x**power)])
        yield total[None, :] - total[:, None]


def _spread(points: Tensor, mass: Tensor) -> np.ndarray:
    """Returns [i, j]: the square error of one entry for the points i..j-1."""
    m0, m1, m2 = _sums(points, mass)
    return m2 - m1**2 / np.maximum(m0, 1e-300)


def _variance(points: Tensor, mass: Tensor) -> np.ndarray:
    """Returns [i, j]: the variance of stochastic rounding of the points i..j to one of these two."""
    m0, m1, m2 = (m[:-1, :-1] for m in _sums(points, mass))
    a, b = points.numpy()[:, None], points.numpy()[None, :]
    return (a + b) * m1 - m2 - a * b * m0


def _path(cost: np.ndarray, steps: int) -> list[int]:
    """Returns the nodes between the first and the last of the cheapest ascending path of so many steps.

    cost: [from, to].
    """
    into = np.where(np.tri(len(cost), dtype=bool), math.inf, np.maximum(cost, 0)).T.copy()
    best, last = into[:, 0], []
    for _ in range(steps - 1):
        total = best + into
        last.append(total.argmin(1))
        best = np.take_along_axis(total, last[-1][:, None], 1)[:, 0]
    nodes, end = [], len(cost) - 1
    for index in reversed(last):
        end = int(index[end])
        nodes.append(end)
    return nodes[::-1]


def _means(codes: Tensor, values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Returns the weighted mean of the values of each code, ascending.

    A code without values takes the entry below it.
    """
    mass = torch.zeros(count, dtype=torch.float64).index_add_(0, codes.long(), weights)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, codes.long(), weights * values)
    means = torch.where(mass > 0, total / mass, -math.inf)
    means[0] = torch.where(mass[0] > 0, means[0], values.min())
    return means.cummax(0).values


def pointwise_weights(x: Tensor) -> Tensor:
    """Returns the density, up to a factor, of the inputs that fixed codebooks are made for.

    It is normal around -1, with a wide floor.

    GELU's inputs in a pretrained ViT have means from -0.6 (first block) to -2 (last) and deviations near 1.4.
    """
    return torch.exp(-(((x + 1) / 1.4) ** 2) / 2) + 1e-3 * torch.exp(-((x / 4) ** 2) / 2)


@on_host
def derivative_codebook(
    function: Callable[[Tensor], Tensor],
    bits: int,
    weights: Callable[[Tensor], Tensor] = pointwise_weights,
    stochastic: bool = False,
    histogram: Tensor | None = None,
    entries: Tensor | None = None,
) -> Codebook:
    """Returns the codebook of the derivative of an elementwise `function`, which is called once, on float64 inputs.

    weights: density of the inputs at the centres of the bins, up to a factor. histogram: of inputs, over the bins,
    which then count most. entries: those to use.
    """
    edges = torch.linspace(-RANGE, RANGE, POINTWISE_BINS + 1, dtype=torch.float64)
    values = _mean_slopes(function, edges)
    density = _mixed(weights((edges[1:] + edges[:-1]) / 2), histogram)
    return fit(values, density, bits, -RANGE, RANGE, stochastic, entries)


def _mean_slopes(function: Callable[[Tensor], Tensor], edges: Tensor) -> Tensor:
    """Returns the mean of f' over each bin; where f itself jumps, as softplus does at its threshold, that beside it.

    Autograd knows no jump, which would be a spike of thousands.
    """
    slopes = function(edges).diff() / edges.diff()
    beside = torch.cat([slopes[:1], slopes, slopes[-1:]]).unfold(0, 3, 1).median(1).values
    return torch.where((slopes - beside).abs() > JUMP, beside, slopes)


def _mixed(density: Tensor, histogram: Tensor | None) -> Tensor:
    """Returns the histogram with a little of the density, since inputs may drift while training."""
    if histogram is None:
        return density
    total = histogram.double().sum().clamp_min(1e-300)
    return histogram.double() / total + FLOOR * density / density.sum()


def uniform_entries(function: Callable[[Tensor], Tensor], bits: int) -> Tensor:
    """Returns the uniform grid on f' from its least value to its largest, to compare with."""
    edges = torch.linspace(-RANGE, RANGE, POINTWISE_BINS + 1, dtype=torch.float64)
    values = function(edges).diff() / edges.diff()
    return torch.linspace(float(values.min()), float(values.max()), 2**bits, dtype=torch.float64)


@on_host
def signed_codebook(bits: int, group_size: int, stochastic: bool = False) -> Codebook:
    """Returns the codebook of a value divided by the one of the largest magnitude in its group, sign included.

    Two entries are fixed at 0 and 1: where one channel is a hundred times larger than its group (residual streams of
    ViTs have such), it is kept exactly, and the others not as something larger than they are. The other entries are
    best for a normal variable in groups of `group_size`, its error weighted by the group's magnitude squared, mixed
    with a sharper peak for groups with such outliers.
    """
    u = _centres(-1)
    largest = torch.linspace(0.02, 8, 400, dtype=torch.float64)[:, None]
    inside = torch.erf(largest / math.sqrt(2))
    density = torch.exp(group_size * torch.log(inside) - largest**2 / 2 + 3 * torch.log(largest)) / inside**2
    normal = (density * torch.exp(-((largest * u) ** 2) / 2)).sum(0)
    peak = torch.exp(-u.abs() / 0.1)
    weights = normal / normal.sum() + peak / peak.sum()
    weights[[GROUP_BINS // 2 - 1, GROUP_BINS // 2, -1]] = 100
    return fit(u, weights, bits, -1.0, 1.0, stochastic)


@on_host
def unit_codebook(
    bits: int, stochastic: bool = False, histogram: Tensor | None = None, entries: Tensor | None = None
) -> Codebook:
    """Returns the codebook of a value in [0, 1], a probability divided by the largest in its group.

    Its fixed density is 1 / (u + 1e-4). Most of a map is next to nothing, and its sum counts: entries made for larger
    values would round it with a bias.
    """
    u = _centres(0)
    return fit(u, _mixed(1 / (u + 1e-4), histogram), bits, 0.0, 1.0, stochastic, entries)


@on_host
def slopes_codebook(outside: float, inside: float, dtype: torch.dtype) -> Codebook:
    """Returns the two slopes of a function of straight lines; its codes come from comparisons, not bins."""
    return Codebook(1, 0.0, 0.0, torch.empty(0, dtype=torch.uint8), torch.tensor([outside, inside], dtype=dtype))


@on_host
def mask_codebook(p: float, dtype: torch.dtype) -> Codebook:
    """Returns 0 and 1 / (1 - p), rounded as PyTorch's dropout rounds its noise."""
    kept = torch.tensor([0.0, 1.0], dtype=dtype).div_(1 - p)
    return Codebook(1, 0.0, 0.0, torch.empty(0, dtype=torch.uint8), kept if dtype == torch.float64 else kept.float())


def _centres(low: float) -> Tensor:
    """Returns the centres of bins from low to 1.

    The outermost are the ends themselves, which are as frequent as groups.
    """
    edges = torch.linspace(low, 1, GROUP_BINS + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    centres[0], centres[-1] = low, 1
    return centres


def pointwise(
    function: Callable[..., Tensor], parameters: dict, bits: int, like: Tensor, stochastic: bool = False
) -> Codebook:
    """Returns the fixed codebook of an elementwise function with these keyword arguments, where `like` is."""
    return placed(_pointwise, (function, tuple(sorted(parameters.items())), bits, stochastic), like)


def slopes(outside: float, inside: float, like: Tensor) -> Codebook:
    """Returns the codebook of a function with these two slopes, where `like` is."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return placed(slopes_codebook, (outside, inside, dtype), like)


def mask(p: float, like: Tensor) -> Codebook:
    """Returns the codebook of a dropout mask, where `like` is."""
    return placed(mask_codebook, (p, like.dtype), like)


def signed(bits: int, group_size: int, like: Tensor, stochastic: bool = False) -> Codebook:
    """Returns the codebook of normalised values in groups that share a scale, where `like` is."""
    return placed(signed_codebook, (bits, group_size, stochastic), like)


def unit(bits: int, like: Tensor, stochastic: bool = False) -> Codebook:
    """Returns the codebook of softmax maps, where `like` is."""
    return placed(unit_codebook, (bits, stochastic), like)


def _pointwise(function: Callable[..., Tensor], parameters: tuple, bits: int, stochastic: bool) -> Codebook:
    return derivative_codebook(functools.partial(function, **dict(parameters)), bits, stochastic=stochastic)


@functools.cache
def _made(make: Callable[..., Codebook], arguments: tuple) -> Codebook:
    with torch.no_grad(), _disable_current_modes():  # real, whatever is being traced
        return make(*arguments)


@functools.cache
def _on(make: Callable[..., Codebook], arguments: tuple, device: torch.device) -> Codebook:
    return _made(make, arguments).to(device)


def placed(make: Callable[..., Codebook], arguments: tuple, like: Tensor) -> Codebook:
    """Returns make(*arguments), made once, where `like` is."""
    if not isinstance(like, FakeTensor):
        return _on(make, arguments, like.device)
    known = _FAKES.setdefault(like.fake_mode, {})
    if (make, arguments) not in known:
        with _disable_current_modes():  # a prediction no more counts it than it counts the real one
            known[make, arguments] = _made(make, arguments)._each(like.fake_mode.from_tensor)
    return known[make, arguments]
