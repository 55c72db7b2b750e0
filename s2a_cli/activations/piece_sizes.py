"""How many elements are worked on at a time, by device.

Small pieces keep what a step has beside the kept activations small. Each costs as many kernel launches as the whole,
which a CPU hardly notices, and a fast GPU should: its work on 2^20 elements is a few microseconds, no more than what
the host needs to launch it (an estimate from memory bandwidth; no GPU has confirmed the sizes). The counts of operators
and the predicted peaks that follow are in benchmarks/operators/operators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PieceSizes:
    """In elements, for quant.chunks=null. A piece has at least one sample, whatever these say."""

    block: int  # of the input of a block, at least
    wide: int  # of the input of a block that holds layers more than twice as wide, and no MLP, at least
    mlp: int  # of the input of an MLP within a block, whose hidden layer is some four times as wide, at least
    recomputed: int  # of the input of a block that is computed again in the backward pass, at least
    forward: int  # of the input of a block without a backward pass, at least
    decoded: int  # at most so many are decoded at a time, where the result feeds a matrix product or a convolution
    pooled: int  # at most so many of a hidden state are pooled and normalised at a time


BY_DEVICE = {
    "cpu": PieceSizes(
        block=1 << 20, wide=1 << 20, mlp=1 << 20, recomputed=1 << 20, forward=1 << 20, decoded=1 << 21, pooled=1 << 21
    ),
    "cuda": PieceSizes(
        block=1 << 25, wide=1 << 21, mlp=1 << 22, recomputed=1 << 22, forward=1 << 21, decoded=1 << 24, pooled=1 << 23
    ),
}
MOST_CHUNKS = 8  # of a batch
_planned: str | None = None


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within it, tensors of any device are worked on in pieces as those of `device` are: for predictions."""
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def piece_sizes(device: torch.device) -> PieceSizes:
    return BY_DEVICE.get(_planned or device.type, BY_DEVICE["cuda"])
