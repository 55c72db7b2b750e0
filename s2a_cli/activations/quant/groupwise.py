"""Keeps a tensor as packed codes with a scale a group, and brings it back a few samples at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2a_cli.activations.chunk_sizes import chunk_sizes
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.packing import inverse, memory_order
from s2a_cli.activations.quant.primitives import dequantize_groupwise, quantize_groupwise


@dataclass(frozen=True)
class GroupwiseLayout:
    """Says how to read codes and scales as a tensor of this shape.

    They are the rows, of `width`, of x.permute(order).
    """

    codebook: codebooks.Codebook
    shape: tuple[int, ...]
    order: tuple[int, ...]
    width: int
    group_size: int
    channels: Tensor | None = None  # the shift and factor of each place of a row: [3, width], see with_inverse

    def dequantize(
        self, packed: Tensor, scales: Tensor, dtype: torch.dtype, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Returns the samples start:stop, all by default."""
        samples, stop = self.shape[0], self.shape[0] if stop is None else stop
        rows = scales.shape[0]
        if rows % samples:  # samples do not end where rows do
            return self._read(packed, scales, dtype, 0, rows, samples)[start:stop]
        rows //= samples
        return self._read(packed, scales, dtype, start * rows, stop * rows, stop - start)

    def _read(self, packed: Tensor, scales: Tensor, dtype: torch.dtype, start: int, stop: int, samples: int) -> Tensor:
        values = dequantize_groupwise(
            packed,
            scales,
            self.codebook.entries,
            self.width,
            self.group_size,
            self.codebook.bits,
            start,
            stop,
            dtype,
            self.channels,
        )
        return values.view([samples, *(self.shape[d] for d in self.order[1:])]).permute(inverse(self.order))


def keep_quantized(
    x: Tensor,
    bits: int,
    group_size: int,
    flat: bool = False,
    seed: int | None = None,
    calibrated: Callable[[Tensor], Tensor | None] = lambda rows: None,
) -> tuple[GroupwiseLayout, Tensor, Tensor]:
    """Returns the layout, packed codes and scales of x [samples, ..., width], which has no gradient of its own.

    Groups lie along the last dimension; with `flat`, across dimensions as x lies in memory, where they fit. seed: of
    stochastic rounding. calibrated: gives the shift and factor of each channel of x as it is grouped.
    """
    order = memory_order(x)
    if x.dim() > 2 and x.stride(-1) > x.stride(-2):  # a transposed matrix: rows where they lie
        order = (*range(x.dim() - 2), x.dim() - 1, x.dim() - 2)
    if order[0] != 0:
        order = tuple(range(x.dim()))
    laid = x.permute(order)
    if flat and laid.is_contiguous() and x.numel() % group_size == 0:
        laid = laid.view(-1, group_size)
    width, channels = laid.shape[-1], calibrated(laid)
    codebook = codebooks.signed(bits, min(group_size, width), x, seed is not None)
    packed, scales = quantize_groupwise(
        laid, codebook.bin_codes, codebook.low, group_size, bits, codebook.chances, seed or 0, channels
    )
    return GroupwiseLayout(codebook, tuple(x.shape), order, width, group_size, channels), packed, scales


def decoded_chunks(x: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Yields the chunks of the batch x that are dequantized at a time, of about the same size.

    elements: of a sample; None: as x has.
    """
    samples, most = x.shape[0], chunk_sizes(x.device).decoded
    step = max(1, most // max(math.prod(x.shape[1:]) if elements is None else elements, 1))
    step = max(1, -(-samples // max(1, -(-samples // step))))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def write_chunk(whole: Tensor | None, values: Tensor, chunk: slice, samples: int) -> Tensor:
    """Writes the samples `chunk` of `whole`, and returns that; makes it, laid out like `values`, where it is None.

    samples: of the whole batch.
    """
    if chunk.stop - chunk.start == samples:
        return values
    if whole is None:
        shape, strides, step = (samples, *values.shape[1:]), [0] * values.dim(), 1
        for dim in reversed(memory_order(values)):
            strides[dim], step = step, step * shape[dim]
        whole = values.new_empty_strided(shape, strides)  # no view, which could not be changed in place
    whole[chunk] = values
    return whole
