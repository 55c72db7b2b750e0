"""Says how much is worked on at a time, by device: every size that decides how work is cut is here.

Small chunks keep what a step has beside the kept activations small. Each costs as many kernel launches as the whole.
A CPU hardly notices; a fast GPU should: its work on 2^20 elements takes a few microseconds, no more than the host needs
to launch it. That is an estimate from memory bandwidth: no GPU has confirmed the sizes. The counts of operators and the
predicted peaks that follow are in benchmarks/operators/operators.md.

The tiles of Triton kernels are beside the kernels (kernels/launch.py): they depend on registers, not on launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChunkSizes:
    """Numbers of elements. The first five hold for quant.chunks=null; a chunk of the batch has at least one sample."""

    block: int  # of the input of a block, at least
    wide: int  # of the input of a block that holds layers more than twice as wide, and no MLP, at least
    mlp: int  # of the input of an MLP within a block, whose hidden layer is some four times as wide, at least
    recomputed: int  # of the input of a block that is computed again in the backward pass, at least
    forward: int  # of the input of a block without a backward pass, at least
    decoded: int  # at most so many are dequantized at a time, where the result feeds a matmul or a convolution
    pooled: int  # at most so many of a hidden state are pooled and normalised at a time
    read: int  # at most so many of what several hidden states are pooled to are read together
    temporary: int  # at most so many at a time within an operator that packs or unpacks codes


BY_DEVICE = {
    "cpu": ChunkSizes(
        block=1 << 20,
        wide=1 << 20,
        mlp=1 << 20,
        recomputed=1 << 20,
        forward=1 << 20,
        decoded=1 << 21,
        pooled=1 << 21,
        read=1 << 21,
        temporary=1 << 18,  # large enough to hide the overhead of a call, small enough for a cache
    ),
    "cuda": ChunkSizes(
        block=1 << 25,
        wide=1 << 21,
        mlp=1 << 22,
        recomputed=1 << 22,
        forward=1 << 21,
        decoded=1 << 24,
        pooled=1 << 23,
        read=1 << 21,
        temporary=1 << 22,
    ),
}
MOST_CHUNKS = 8  # of a batch, with quant.chunks=null
_planned: str | None = None


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Cuts work on tensors of any device as that of `device` is cut: for predictions."""
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def planned_device(device: torch.device) -> str:
    """Returns the type of device that work on this one is planned for: its own, or that of a prediction."""
    return _planned or device.type


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """Returns the sizes for tensors on this device; those of CUDA for one that is not listed."""
    return BY_DEVICE.get(planned_device(device), BY_DEVICE["cuda"])
