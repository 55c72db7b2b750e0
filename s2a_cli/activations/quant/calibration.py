"""Fits the codes of a run to each layer's own inputs, as some of its first forward passes show them.

- pointwise functions: the codebook entries that are best for a histogram of the layer's inputs;
- softmax maps: likewise, for probabilities divided by the largest of their group, weighted by its square;
- normalised activations and inputs of blocks and layers: a shift and a factor for each channel. Residual streams of
  ViTs have channels a hundred times larger than the rest, and with means far from 0; a group that holds one would be
  coded as coarsely as that channel. Shifted and divided, all channels of a group are alike.

A layer is looked at in its first forward pass and in three later ones, so that what is odd about one batch does not
stay: histograms are added up, of shifts and factors the median counts. Within a batch, samples far out of the ordinary
are left out of shifts and factors, and a batch from which nothing can be learned, such as a constant one, is none.

A layer is known by its site (sites.py) and what is coded there: with another function, width or number of bits it is
another one. All is deterministic, and part of a run's state. Sums and entries are found on the CPU.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.primitives import with_inverse
from s2a_cli.common.dataless import is_dataless
from s2a_cli.config.schema import QuantConfig

LOOKS = (0, 1, 4, 16)  # forward passes after a layer's first in which it is looked at
PATIENCE = 64  # forward passes after which a layer that told nothing is not looked at any more
SAMPLE = 1 << 16  # elements of a layer's input that a histogram is made of
ROWS = 1 << 18  # elements that the shifts and factors are made of
LEAST = 0.1  # of the median factor: a channel that was constant may change later
ODD = 25.0  # times the usual square deviation: a sample beyond is left out

Fitted = codebooks.Codebook | Tensor


@dataclass
class Layer:
    """Holds what has been found at a site. Saved runs contain these names."""

    first: int  # number of the forward pass in which it was seen first
    last: int = -1  # and last looked at
    looks: int = 0
    # On the CPU: the sum of histograms [bins], or the shifts and factors of each look [looks, 2, width].
    seen: Tensor | None = None
    fitted: Tensor | None = None  # codebook entries [2**bits], or channels [2, width]; on the CPU

    def due(self, number: int) -> bool:
        """Returns whether it is to be looked at in the forward pass of that number."""
        return self.last < number and self.looks < len(LOOKS) and LOOKS[self.looks] <= number - self.first < PATIENCE


class Calibration:
    """Holds the fitted entries and channels of a run by layer, and its count of random draws."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.is_stochastic = config.rounding == "stochastic"
        self._passes = 0
        self._layers: dict[str, Layer] = {}
        self._ready: dict[str, Fitted] = {}  # made of what was fitted, where it is used
        self._traced: dict[str, Fitted] = {}  # their stand-ins in a prediction or a trace
        self._is_paused = False
        self._draws, self._origin = 0, torch.initial_seed()

    def next_pass(self) -> None:
        """Begins a forward pass of the whole model."""
        self._passes += 1

    def seed(self) -> int | None:
        """Returns the seed of the next stochastic rounding; None where codes are the nearest."""
        if not self.is_stochastic:
            return None
        self._draws += not self._is_paused  # what only looks at a block is made anew by a run that goes on
        return (self._origin * 6364136223846793005 + self._draws * 1442695040888963407) % 2**62

    def pointwise(
        self, site: str, function: Callable[..., Tensor], parameters: dict, bits: int, x: Tensor
    ) -> codebooks.Codebook:
        """Returns the codebook of `function` for inputs like x."""
        said = "".join(f" {name}={value}" for name, value in sorted(parameters.items()))
        key = f"{site}/{function.__name__}{said}/{bits}"
        if isinstance(ready := self._is_ready(key, x), codebooks.Codebook):
            return ready
        slope = functools.partial(function, **parameters)
        make = functools.partial(codebooks.derivative_codebook, slope, bits, stochastic=self.is_stochastic)
        found = self._look(key, x, lambda: _histogram(x), make)
        return found or self._stand_in(key, codebooks.pointwise(function, parameters, bits, x, self.is_stochastic), x)

    def unit(self, site: str, p: Tensor, bits: int) -> codebooks.Codebook:
        """Returns the codebook of softmax maps like p [..., keys]."""
        key, group_size = f"{site}/map/{bits}", self.config.group
        if isinstance(ready := self._is_ready(key, p), codebooks.Codebook):
            return ready
        make = functools.partial(codebooks.unit_codebook, bits, stochastic=self.is_stochastic)
        return self._look(key, p, lambda: _shares(p, group_size), make) or self._stand_in(
            key, codebooks.unit(bits, p, self.is_stochastic), p
        )

    def _look(
        self, key: str, x: Tensor, find: Callable[[], Tensor], make: Callable[..., codebooks.Codebook]
    ) -> codebooks.Codebook | None:
        """Returns the codebook of a layer, from its histograms up to now or from the entries that they gave.

        None where a fixed one serves.
        """
        layer = self._layer(key, x)
        if layer is None:
            return None
        if layer.due(self._passes) and not self._is_paused:
            with _on_the_host():
                found = find().cpu()
                layer.seen = found if layer.seen is None else layer.seen + found
                layer.looks, layer.last = layer.looks + 1, self._passes
                layer.fitted = make(histogram=layer.seen).entries
                layer.seen = layer.seen if layer.looks < len(LOOKS) else None
        if layer.fitted is None:
            return None
        with _on_the_host():
            codebook = make(entries=layer.fitted)
        self._ready[key] = codebook = codebook.to(x.device, copy=True)
        return codebook

    def channels(self, site: str, x: Tensor, change: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor | None:
        """Returns shift, factor and 1 / factor of each place of the rows of x [..., width], float32 [3, width].

        None where rows are coded as they are. change: gives what is coded from rows [n, width] of x, where that is not
        x itself.
        """
        key = f"{site}/channels/{x.shape[-1]}"
        if isinstance(ready := self._is_ready(key, x), Tensor):
            return ready
        if is_dataless(x) and self.config.calibrate and not self._is_paused:
            self._traced[key] = channels = x.new_empty((3, x.shape[-1]), dtype=torch.float32)
            return channels
        layer = self._layer(key, x)
        if layer is None:
            return None
        if layer.due(self._passes) and not self._is_paused:
            with _on_the_host():
                found = _channels(x, change)
                if found is not None:
                    seen = found[None].cpu() if layer.seen is None else torch.cat([layer.seen, found[None].cpu()])
                    layer.looks += 1
                    layer.fitted = seen.quantile(0.5, 0)
                    layer.seen = seen if layer.looks < len(LOOKS) else None
            layer.last = self._passes
        if layer.fitted is None:
            return None
        with _on_the_host():
            channels = with_inverse(layer.fitted)
        self._ready[key] = channels = channels.to(x.device, copy=True)
        return channels

    def _layer(self, key: str, x: Tensor) -> Layer | None:
        """Returns the layer of that key; None where there is nothing to be learned."""
        if not self.config.calibrate or is_dataless(x) or x.numel() == 0:
            return None
        if key not in self._layers and not self._is_paused:
            self._layers[key] = Layer(first=self._passes)
        return self._layers.get(key)

    def _is_ready(self, key: str, x: Tensor) -> Fitted | None:
        """Returns what serves inputs like x at this layer, if it was made before and no look is due."""
        layer = self._layers.get(key)
        if layer is not None and layer.due(self._passes) and not self._is_paused and not is_dataless(x):
            return None
        ready = (self._traced if is_dataless(x) else self._ready).get(key)
        tensor = ready.entries if isinstance(ready, codebooks.Codebook) else ready
        fits = (
            tensor is not None
            and tensor.device == x.device
            and isinstance(tensor, FakeTensor) == isinstance(x, FakeTensor)
        )
        return ready if fits else None

    def _stand_in(self, key: str, codebook: codebooks.Codebook, x: Tensor) -> codebooks.Codebook:
        """Returns a fixed codebook; for inputs without data one of the layer's own, as a fitted one would be."""
        if is_dataless(x) and self.config.calibrate and not self._is_paused:
            self._traced[key] = codebook = codebook.dataless(x)
        return codebook

    @property
    def is_settled(self) -> bool:
        """Whether no layer that was seen is going to be looked at again."""
        return self._is_paused or not any(
            layer.looks < len(LOOKS) and self._passes + 1 - layer.first < PATIENCE for layer in self._layers.values()
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Fits nothing within: what runs there is not the run's data."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def fitted(self) -> dict[str, Tensor]:
        """Returns {layer: its entries or channels}, for a record."""
        return {key: layer.fitted for key, layer in self._layers.items() if layer.fitted is not None}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a run needs to go on as it was."""
        layers = {key: vars(layer).copy() for key, layer in self._layers.items()}
        return {"layers": layers, "draws": [self._origin, self._draws], "passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; of a state without layers, as version 0.1 wrote them, the count of draws."""
        self._layers = {key: Layer(**layer) for key, layer in state.get("layers", {}).items()}
        self._ready = {}
        self._origin, self._draws = map(int, state["draws"])
        self._passes = state.get("passes", 0)


@contextmanager
def _on_the_host() -> Iterator[None]:
    """Hides what is made within from trackers: it is no part of a step's memory on a device."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _histogram(x: Tensor) -> Tensor:
    """Counts how many of a sample of x lie in each bin of a pointwise codebook."""
    sample = _rows(x.unsqueeze(-1), SAMPLE)[0].nan_to_num_(0, 0, 0).clamp_(-codebooks.RANGE, codebooks.RANGE)
    return torch.histc(sample.cpu(), codebooks.POINTWISE_BINS, -codebooks.RANGE, codebooks.RANGE)


def _shares(p: Tensor, group_size: int) -> Tensor:
    """Weighs the bins of a unit codebook by the squared scale of what lies in them, for a sample of p [..., keys]."""
    rows = _rows(p)[0].cpu()
    group_size = min(group_size, rows.shape[1])
    shares = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size)).view(len(rows), -1, group_size)
    scale = shares.amax(-1, keepdim=True)
    bins = (shares / scale).nan_to_num_(0, 0, 0).mul_(codebooks.GROUP_BINS).int().clamp_(0, codebooks.GROUP_BINS - 1)
    weight = scale.nan_to_num_(0, 0, 0).square_().expand_as(shares)
    return torch.bincount(bins.flatten(), weight.flatten(), codebooks.GROUP_BINS)


def _rows(x: Tensor, elements: int = ROWS) -> tuple[Tensor, Tensor]:
    """Returns some rows of x [..., width], from all over it, and the sample of each.

    Rows are float32 [n, width], with n * width at most `elements`.
    """
    if x.dim() == 1:
        return x[None].float(), torch.zeros(1, dtype=torch.int64, device=x.device)
    count, total = max(1, elements // x.shape[-1]), x.numel() // x.shape[-1]
    step = -(-total // count) | 1  # odd, so that rows of a power of two meet all places of it
    chosen = torch.arange(0, total, step, device=x.device)
    return x[torch.unravel_index(chosen, x.shape[:-1])].float(), chosen // (total // len(x))


def _channels(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Returns mean and deviation of each place of the changed rows of x, [2, width]; None where they tell nothing."""
    rows, sample = _rows(x)
    rows = change(rows)
    rows = rows[_usual(rows, sample, len(x) if x.dim() > 1 else 1)]
    if len(rows) < 2:
        return None
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    factor = deviation.clamp_min(LEAST * deviation.median())
    if not (factor.isfinite() & (factor > 0)).any():
        return None
    factor = torch.where(factor > 0, factor, 1.0)
    return torch.stack([mean, factor]).nan_to_num_(0, 1, 1)


def _usual(rows: Tensor, sample: Tensor, samples: int) -> Tensor:
    """Returns which rows [n, width] are of samples like the others.

    Those are finite, and their mean square deviation is at most `ODD` times the median one.
    """
    with warnings.catch_warnings():  # of the places of medians on CUDA, which are not asked for
        warnings.filterwarnings("ignore", "median CUDA with indices")
        centre = rows.nanmedian(0).values
        spread = (rows - centre).abs().nanmedian(0).values
    spread = spread.clamp_min(LEAST * spread.nanmedian())
    square = torch.where(spread > 0, ((rows - centre) / spread).square_(), 0.0).mean(1)
    square = square.masked_fill_(~rows.isfinite().all(1), math.inf)
    total = rows.new_zeros(samples).index_add_(0, sample, square)
    mean = total / rows.new_zeros(samples).index_add_(0, sample, torch.ones_like(square))
    finite = mean.isfinite()
    usual = finite & (mean <= ODD * mean[finite].median()) if finite.any() else finite
    return usual[sample]
