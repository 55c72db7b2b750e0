"""Draws the random numbers of a block that is computed again, or in chunks of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class SampleDraws:
    """Draws random numbers for a block that runs in chunks: one a sample for the whole batch, as without chunks."""

    def __init__(self, samples: int):
        self.samples, self.chunk = samples, slice(0)
        self._drawn: list[Tensor] = []
        self._next = 0

    def begin(self, chunk: slice) -> None:
        """Begins the chunk of these samples: it gets their share of what was drawn before."""
        self.chunk, self._next = chunk, 0

    def bernoulli_(self, input: Tensor, p: Any = 0.5, **kwargs: Any) -> Tensor:
        """Does what Tensor.bernoulli_ does, as stochastic depth calls it on [B, 1, ...]."""
        samples = self.chunk.stop - self.chunk.start
        if isinstance(p, Tensor) or not input.dim() or not samples == len(input) == input.numel():
            return input.bernoulli_(p, **kwargs)
        if self._next == len(self._drawn):
            self._drawn.append(input.new_empty((self.samples, *input.shape[1:])).bernoulli_(p, **kwargs))
        self._next += 1
        return input.copy_(self._drawn[self._next - 1][self.chunk])


def batch_chunks(samples: int, size: int) -> Iterator[tuple[slice, SampleDraws | None]]:
    """Yields the chunks of a batch of so many samples, `size` each, with their random numbers if there are several."""
    draws = SampleDraws(samples) if size < samples else None
    for start in range(0, samples, size):
        chunk = slice(start, min(start + size, samples))
        if draws:
            draws.begin(chunk)
        yield chunk, draws


def random_state(device: torch.device) -> list[Tensor]:
    """Returns the states of the generators that operators on this device draw from.

    While a CUDA graph is captured that of the device can't be read: what is captured must not draw there.
    """
    reads = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if reads else [])


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
