"""Packs low-bit codes into bytes, and walks through a tensor in short spans of elements.

Bytes kept for n elements of b bits:

    packed_size(n, b) = sum over the planes p of b of ceil(n * p / 8)  (1, 2, 4, 8 bits are one plane: ceil(n * b / 8))
    groupwise_size    = packed_size(n, b) + 2 * rows * ceil(width / group)  (a bfloat16 scale for each group of a row)

A plane holds 1, 2, 4 or 8 bits of each code, so that a byte holds whole codes: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 +
2 + 1 bits. Element i of a plane of p bits lies in byte i * p // 8, lowest bits first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s2a_cli.activations.chunk_sizes import chunk_sizes

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes
_WIDE = {**_INTEGER, 16: torch.complex128}  # element types to copy that many bytes at once


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes of `count` packed codes."""
    return sum((count * plane + 7) // 8 for plane in PLANES[bits])


def groupwise_size(rows: int, width: int, group_size: int, bits: int) -> int:
    """Returns the bytes of the codes and scales of `rows` rows of `width` elements, `group_size` elements a scale."""
    return packed_size(rows * width, bits) + 2 * rows * groups_per_row(width, group_size)


def groups_per_row(width: int, group_size: int) -> int:
    """Returns how many scales a row of `width` elements has; the last group may be short."""
    return (width + group_size - 1) // group_size


def pack_into(packed: Tensor, start: int, codes: Tensor, bits: int, count: int) -> None:
    """Writes `codes` (uint8 or bool [n], fresh storage), the elements from `start` of `count`, into `packed`.

    `start` is a multiple of 8, so that it begins a byte in every plane.
    """
    offset = low = 0
    for plane in PLANES[bits]:
        part = codes if plane == bits else (codes >> low) & (2**plane - 1)
        data = _pack_plane(part, plane)
        begin = offset + start * plane // 8
        packed[begin : begin + data.numel()] = data
        offset += (count * plane + 7) // 8
        low += plane


def _pack_plane(codes: Tensor, plane: int) -> Tensor:
    per_byte = 8 // plane
    if per_byte == 1:
        return codes
    if short := -codes.numel() % per_byte:
        codes = torch.nn.functional.pad(codes, (0, short))
    # The codes of one byte, read as one integer: fold pairs together, then pairs of pairs, down to the low byte.
    word = codes.view(_INTEGER[per_byte])
    for step in range(per_byte.bit_length() - 1):
        word = word | (word >> ((8 - plane) << step))
    return word.to(torch.uint8)


def unpack(packed: Tensor, start: int, stop: int, bits: int, count: int) -> Tensor:
    """Returns the codes (uint8) of the elements start:stop of `count`; `start` is a multiple of 8."""
    codes: Any = None
    offset = low = 0
    for plane in PLANES[bits]:
        data = packed[offset + start * plane // 8 : offset + (stop * plane + 7) // 8]
        part = _expand(data, _digits(plane, packed.device))[: stop - start] << low
        codes = part if codes is None else codes | part
        offset += (count * plane + 7) // 8
        low += plane
    return codes


def byte_table(entries: Tensor, bits: int) -> Tensor:
    """Returns what a packed byte stands for: [256, codes a byte].

    Where codes span planes: `entries` as [2**bits, 1].
    """
    if len(PLANES[bits]) > 1:
        return entries.unsqueeze(1)
    return entries[_digits(bits, entries.device).int()]


def lookup(packed: Tensor, start: int, stop: int, table: Tensor, bits: int, count: int) -> Tensor:
    """Returns the entries of the elements start:stop of `count`, from a `byte_table`; `start` is a multiple of 8."""
    if len(PLANES[bits]) > 1:
        return _expand(unpack(packed, start, stop, bits, count), table)
    return _expand(packed[start * bits // 8 : (stop * bits + 7) // 8], table)[: stop - start]


def _expand(data: Tensor, table: Tensor) -> Tensor:
    """Returns table[data] flattened.

    Copies a row of up to 16 bytes as one element: several times faster than row by row.
    """
    wide = None if data.is_mps else _WIDE.get(table.element_size() * table.shape[1])  # MPS lacks complex128
    rows = table if wide is None else table.view(wide).view(-1)
    return torch.index_select(rows, 0, data.int()).view(table.dtype).view(-1)


@functools.cache
def _digits(plane: int, device: torch.device) -> Tensor:
    """Returns the codes in each byte value: uint8 [256, 8 // plane]."""
    shifts = torch.arange(0, 8, plane, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & (2**plane - 1)).to(torch.uint8)


def elements(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields contiguous 1-d spans of `x` in logical order, each with the index of its first element.

    That index is a multiple of 8.
    """
    for start, span in rows(x.unsqueeze(-1), 1):
        yield start, span.view(-1)


def rows(x: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Yields contiguous spans [r, width] of `x` read as rows of `width`, each with the index of its first row.

    That index is a multiple of 8, so that the codes of a span begin a byte. A strided `x` is copied a few samples at a
    time, never whole, unless a sample is no multiple of 8 rows.
    """
    if x.numel() == 0:
        return
    sample_rows = x[0].numel() // width
    if x.is_contiguous() or sample_rows % 8:
        step = max(8, chunk_sizes(x.device).temporary // width // 8 * 8)
        spans = x.reshape(-1, width).split(step)
    else:
        step = max(1, chunk_sizes(x.device).temporary // x[0].numel())
        spans = (span.reshape(-1, width) for span in x.split(step))
        step *= sample_rows
    for index, span in enumerate(spans):
        # One sample may be a view all the same: [1, heads, N, d] of [1, N, heads, d].
        yield index * step, span.contiguous()


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Returns the order of dimensions in which `x` lies in memory, if it lies there without gaps; else its own."""
    own = tuple(range(x.dim()))
    if x.is_contiguous():
        return own
    order = tuple(sorted(own, key=lambda dim: (-x.stride(dim), dim)))
    return order if x.permute(order).is_contiguous() else own


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
