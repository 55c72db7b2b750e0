"""Random numbers of a block that is computed again, or in pieces of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Draws:
    """The random numbers of a block that runs in pieces: one a sample are drawn for the whole batch, as without
    pieces.
    """

    def __init__(self, samples: int):
        self.samples, self.part = samples, slice(0)
        self._drawn: list[Tensor] = []
        self._next = 0

    def begin(self, part: slice) -> None:
        self.part, self._next = part, 0

    def bernoulli_(self, input: Tensor, p: Any = 0.5, **kwargs: Any) -> Tensor:
        """Tensor.bernoulli_, as stochastic depth calls it on [B, 1, ...]."""
        if (
            isinstance(p, Tensor)
            or not input.dim()
            or not self.part.stop - self.part.start == len(input) == input.numel()
        ):
            return input.bernoulli_(p, **kwargs)
        if self._next == len(self._drawn):
            self._drawn.append(input.new_empty((self.samples, *input.shape[1:])).bernoulli_(p, **kwargs))
        self._next += 1
        return input.copy_(self._drawn[self._next - 1][self.part])


def parts(samples: int, size: int) -> Iterator[tuple[slice, Draws | None]]:
    """The pieces of a batch, with their random numbers where there are several."""
    draws = Draws(samples) if size < samples else None
    for start in range(0, samples, size):
        part = slice(start, min(start + size, samples))
        if draws:
            draws.begin(part)
        yield part, draws


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that operators on this device draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
