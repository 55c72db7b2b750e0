"""Custom operators that encode and decode: to a trace each is one node, and what it needs meanwhile is small chunks.

    s2a::encode_levels    x -> codes of the bins of a table
    s2a::encode_interval  x -> 1 bit an element: low < x < high
    s2a::multiply_levels  gradient * level of each code
    s2a::encode_groups    x -> codes and scales, `group` elements of the last dimension a scale
    s2a::decode_groups    the rows start:stop of what encode_groups was given

These are the plain PyTorch implementations, for every device. The operators are not differentiable: the autograd
functions of the operator families call them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from s2a_cli.activations.codes import byte_table, chunk, elements, groups_of, lookup, pack_into, packed_size, rows

_LIBRARY = torch.library.Library("s2a", "DEF")
SCALE = torch.bfloat16  # of groups: the range of float32, so that nothing overflows


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers the decorated function as `s2a::<schema>`, returns the operator; `fake` gives the outputs' shapes."""

    def register(implementation: Callable) -> Callable:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"s2a::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.s2a, name).default

    return register


def working_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assign(x: Tensor, bins: Tensor, low: float, high: float) -> Tensor:
    """Codes (uint8) of a small float32 tensor; NaN gets some code, infinities that of the outermost bin."""
    step = bins.numel() / (high - low)
    index = (x * step).add_(-low * step).clamp_(0, bins.numel() - 1)
    index = index.to(torch.int32).bitwise_and_(bins.numel() - 1)  # NaN may turn into any integer
    return torch.index_select(bins, 0, index.view(-1))


def _fake_codes(x, *args):
    return x.new_empty(packed_size(x.numel(), args[-1]), dtype=torch.uint8)


@operator("encode_levels(Tensor x, Tensor bins, float low, float high, int bits) -> Tensor", _fake_codes)
def encode_levels(x: Tensor, bins: Tensor, low: float, high: float, bits: int) -> Tensor:
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    for start, piece in elements(x):
        pack_into(packed, start, assign(piece.float(), bins, low, high), bits, x.numel())
    return packed


def _fake_interval(x, low, high):
    return _fake_codes(x, 1)


@operator("encode_interval(Tensor x, float low, float high) -> Tensor", _fake_interval)
def encode_interval(x: Tensor, low: float, high: float) -> Tensor:
    packed = x.new_empty(packed_size(x.numel(), 1), dtype=torch.uint8)
    for start, piece in elements(x):
        inside = piece > low
        if high != math.inf:
            inside &= piece < high
        pack_into(packed, start, inside, 1, x.numel())
    return packed


def _fake_multiply(grad, codes, levels, bits):
    return grad.new_empty(grad.shape)


@operator("multiply_levels(Tensor grad, Tensor codes, Tensor levels, int bits) -> Tensor", _fake_multiply)
def multiply_levels(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    out = grad.new_empty(grad.shape)
    flat = out.view(-1)
    table = byte_table(levels.to(working_type(grad.dtype)), bits)
    for start, piece in elements(grad):
        stop = start + piece.numel()
        torch.mul(piece, lookup(codes, start, stop, table, bits, grad.numel()), out=flat[start:stop])
    return out


def encode_rows(
    x: Tensor, packed: Tensor, scales: Tensor, start: int, total: int, bins: Tensor, low: float, group: int, bits: int
) -> None:
    """Codes of a small float32 x [r, width], from row `start` of a tensor of `total`, into `packed` and `scales`."""
    count, width = x.shape
    group = min(group, width)
    short = -width % group
    grouped = (torch.nn.functional.pad(x, (0, short)) if short else x).view(count, -1, group)
    scale = grouped.amax(-1)
    if low < 0:  # the element of the largest magnitude, with its sign
        least = grouped.amin(-1)
        scale = torch.where(scale > -least, scale, least)
    scales[start : start + count] = scale
    factor = scales[start : start + count].float().reciprocal_()  # of the scale as it will be read
    codes = assign(grouped * factor.nan_to_num_(0, 0, 0)[..., None], bins, low, 1.0)
    if short:
        codes = codes.view(count, -1)[:, :width].reshape(-1)
    pack_into(packed, start * width, codes, bits, total * width)


def decode_rows(
    codes: Tensor, scales: Tensor, table: Tensor, start: int, stop: int, width: int, group: int, bits: int
) -> Tensor:
    """Values [stop - start, width] of the rows start:stop, of the byte table's type; `start` is a multiple of 8."""
    values = lookup(codes, start * width, stop * width, table, bits, scales.shape[0] * width).view(-1, width)
    scale = scales[start:stop].to(table.dtype)
    group = min(group, width)
    if width % group == 0:
        values.view(stop - start, -1, group).mul_(scale[..., None])
        return values
    return values.mul_(scale.repeat_interleave(group, 1)[:, :width])


def _fake_encode_groups(x, bins, low, group, bits):
    width = x.shape[-1]
    scales = x.new_empty((math.prod(x.shape[:-1]), groups_of(width, group)), dtype=SCALE)
    return _fake_codes(x, bits), scales


@operator(
    "encode_groups(Tensor x, Tensor bins, float low, int group, int bits) -> (Tensor, Tensor)", _fake_encode_groups
)
def encode_groups(x: Tensor, bins: Tensor, low: float, group: int, bits: int) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    total = math.prod(x.shape[:-1])
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    scales = x.new_empty((total, groups_of(width, group)), dtype=SCALE)
    for start, piece in rows(x, width):
        encode_rows(piece.float(), packed, scales, start, total, bins, low, group, bits)
    return packed, scales


def _fake_decode_groups(codes, scales, levels, width, group, bits, start, stop, dtype):
    return scales.new_empty((stop - start, width), dtype=dtype)


@operator(
    "decode_groups(Tensor codes, Tensor scales, Tensor levels, int width, int group, int bits, "
    "int start, int stop, ScalarType dtype) -> Tensor",
    _fake_decode_groups,
)
def decode_groups(
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    width: int,
    group: int,
    bits: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    out = scales.new_empty((stop - start, width), dtype=dtype)
    table = byte_table(levels.to(working_type(dtype)), bits)
    for first, last in row_ranges(start, stop, width, scales.device):
        skip = first % 8
        values = decode_rows(codes, scales, table, first - skip, last, width, group, bits)
        out[first - start : last - start] = values[skip:]
    return out


def row_ranges(start: int, stop: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """start:stop in chunks; all but the first begin at multiples of 8 rows."""
    step = max(8, chunk(device) // max(width, 1) // 8 * 8)
    cuts = list(range(start // 8 * 8 + step, stop, step))
    return list(zip([start, *cuts], [*cuts, stop])) if stop > start else []
