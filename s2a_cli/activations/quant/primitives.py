"""Custom operators that encode and decode: to a trace each is one node, and what it needs meanwhile is small chunks.

    s2a::encode_levels    x -> codes of the bins of a table
    s2a::activate         x -> an activation function of x, and what encode_levels gives
    s2a::encode_interval  x -> 1 bit an element: low < x < high
    s2a::multiply_levels  gradient * level of each code
    s2a::encode_groups    x -> codes and scales, `group` elements of the last dimension a scale
    s2a::decode_groups    the rows start:stop of what encode_groups was given
    s2a::decode_int8      codes * scale, of frozen weights

Optional arguments: `chances` of a table and a `seed` round stochastically; `channels` [3, width], float32, a shift, a
factor and what with_inverse adds: (x - shift) / factor is what is coded. These are the plain PyTorch implementations,
for every device; `kernels` has a second one of most for CUDA. The operators are not differentiable: the autograd
functions of the operator families call them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from s2a_cli.activations.quant.packing import (
    byte_table,
    chunk,
    elements,
    groups_of,
    lookup,
    memory_order,
    pack_into,
    packed_size,
    rows,
)

_LIBRARY = torch.library.Library("s2a", "DEF")
SCALE = torch.bfloat16  # of groups: the range of float32, so that nothing overflows
PLAIN: dict[str, Callable] = {}  # {name of an operator: its plain implementation}
FAMILIES: dict[str, str] = {}  # {name of an operator: the family that memory breakdowns list it by}
ACTIVATIONS = {
    "gelu": torch.ops.aten.gelu,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu, approximate="tanh"),
    "silu": torch.ops.aten.silu,
    "hardswish": torch.ops.aten.hardswish,
}


def operator(schema: str, fake: Callable, *, family: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the custom operator `s2a::<schema>`, and returns that operator.

    fake: gives outputs of the right shapes and dtypes from inputs without data. family: what memory breakdowns list the
    operator by, one of memory.families.FAMILIES.
    """

    def register(implementation: Callable) -> Callable:
        name = schema.split("(")[0]
        PLAIN[name], FAMILIES[name] = implementation, family
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"s2a::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.s2a, name).default

    return register


def working_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draws:
    """Uniform 16-bit integers from a seed of their own: the global generators go on as if nothing had been drawn."""

    def __init__(self, chances: Tensor, seed: int):
        self.chances = chances
        self.generator = torch.Generator(chances.device).manual_seed(seed)

    def above(self, index: Tensor) -> Tensor:
        """1 with the chance of each bin of `index`, else 0: uint8."""
        words = torch.empty(-(-index.numel() // 4), dtype=torch.int64, device=index.device)
        drawn = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: index.numel()]
        return (drawn < self.chances.index_select(0, index)).view(torch.uint8)


def draws(chances: Tensor | None, seed: int) -> Draws | None:
    return None if chances is None else Draws(chances, seed)


def assign(x: Tensor, bins: Tensor, low: float, high: float, up: Draws | None = None) -> Tensor:
    """Codes (uint8) of a small float32 tensor; NaN gets some code, infinities that of the outermost bin."""
    step = bins.numel() / (high - low)
    index = (x * step).add_(-low * step).clamp_(0, bins.numel() - 1)
    index = index.to(torch.int32).bitwise_and_(bins.numel() - 1).view(-1)  # NaN may turn into any integer
    codes = torch.index_select(bins, 0, index)
    return codes if up is None else codes.add_(up.above(index))


def with_inverse(channels: Tensor) -> Tensor:
    """The shift and factor of each channel [2, width], and 1 / factor: codes are made with products, not divisions."""
    return torch.cat([channels, channels[1:].reciprocal()])


def _fake_codes(x, bits):
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def _fake_encode_levels(x, bins, low, high, bits, chances=None, seed=0):
    return _fake_codes(x, bits)


@operator(
    "encode_levels(Tensor x, Tensor bins, float low, float high, int bits, Tensor? chances=None, int seed=0) -> Tensor",
    _fake_encode_levels,
    family="activation",
)
def encode_levels(
    x: Tensor, bins: Tensor, low: float, high: float, bits: int, chances: Tensor | None = None, seed: int = 0
) -> Tensor:
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    up = draws(chances, seed)
    for start, piece in elements(x):
        pack_into(packed, start, assign(piece.float(), bins, low, high, up), bits, x.numel())
    return packed


def _fake_activate(x, function, bins, low, high, bits):
    return torch.empty_like(x), _fake_codes(x, bits)


@operator(
    "activate(Tensor x, str function, Tensor bins, float low, float high, int bits) -> (Tensor, Tensor)",
    _fake_activate,
    family="activation",
)
def activate(x: Tensor, function: str, bins: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """The function of ACTIVATIONS by that name, and the codes of x as it lies in memory."""
    return ACTIVATIONS[function](x), PLAIN["encode_levels"](x.permute(memory_order(x)), bins, low, high, bits)


def _fake_interval(x, low, high):
    return _fake_codes(x, 1)


@operator("encode_interval(Tensor x, float low, float high) -> Tensor", _fake_interval, family="activation")
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


@operator(
    "multiply_levels(Tensor grad, Tensor codes, Tensor levels, int bits) -> Tensor", _fake_multiply, family="activation"
)
def multiply_levels(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    out = grad.new_empty(grad.shape)
    flat = out.view(-1)
    table = byte_table(levels.to(working_type(grad.dtype)), bits)
    for start, piece in elements(grad):
        stop = start + piece.numel()
        torch.mul(piece, lookup(codes, start, stop, table, bits, grad.numel()), out=flat[start:stop])
    return out


def encode_rows(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    start: int,
    total: int,
    bins: Tensor,
    low: float,
    group: int,
    bits: int,
    up: Draws | None = None,
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
    if up is not None:  # as it will be read no smaller than the element: no level lies beyond 1
        scale = scale * (1 + 2.0**-8)
    scales[start : start + count] = scale
    factor = scales[start : start + count].float().reciprocal_()  # of the scale as it will be read
    codes = assign(grouped * factor.nan_to_num_(0, 0, 0)[..., None], bins, low, 1.0, up)
    if short:
        codes = codes.view(count, -1)[:, :width].reshape(-1)
    pack_into(packed, start * width, codes, bits, total * width)


def decode_rows(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    start: int,
    stop: int,
    width: int,
    group: int,
    bits: int,
    channels: Tensor | None = None,
) -> Tensor:
    """Values [stop - start, width] of the rows start:stop, of the byte table's type; `start` is a multiple of 8."""
    values = lookup(codes, start * width, stop * width, table, bits, scales.shape[0] * width).view(-1, width)
    scale = scales[start:stop].to(table.dtype)
    group = min(group, width)
    if width % group == 0:
        values.view(stop - start, -1, group).mul_(scale[..., None])
    else:
        values.mul_(scale.repeat_interleave(group, 1)[:, :width])
    if channels is not None:
        shift, factor = channels[:2].to(table.dtype)
        torch.addcmul(shift, values, factor, out=values)
    return values


def _fake_encode_groups(x, bins, low, group, bits, chances=None, seed=0, channels=None):
    width = x.shape[-1]
    scales = x.new_empty((math.prod(x.shape[:-1]), groups_of(width, group)), dtype=SCALE)
    return _fake_codes(x, bits), scales


@operator(
    "encode_groups(Tensor x, Tensor bins, float low, int group, int bits, Tensor? chances=None, int seed=0, "
    "Tensor? channels=None) -> (Tensor, Tensor)",
    _fake_encode_groups,
    family="codes",
)
def encode_groups(
    x: Tensor,
    bins: Tensor,
    low: float,
    group: int,
    bits: int,
    chances: Tensor | None = None,
    seed: int = 0,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    total = math.prod(x.shape[:-1])
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    scales = x.new_empty((total, groups_of(width, group)), dtype=SCALE)
    up = draws(chances, seed)
    for start, piece in rows(x, width):
        piece = piece.float()
        if channels is not None:
            piece = (piece - channels[0]).mul_(channels[2])
        encode_rows(piece, packed, scales, start, total, bins, low, group, bits, up)
    return packed, scales


def _fake_decode_groups(codes, scales, levels, width, group, bits, start, stop, dtype, channels=None):
    return scales.new_empty((stop - start, width), dtype=dtype)


@operator(
    "decode_groups(Tensor codes, Tensor scales, Tensor levels, int width, int group, int bits, "
    "int start, int stop, ScalarType dtype, Tensor? channels=None) -> Tensor",
    _fake_decode_groups,
    family="codes",
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
    channels: Tensor | None = None,
) -> Tensor:
    out = scales.new_empty((stop - start, width), dtype=dtype)
    table = byte_table(levels.to(working_type(dtype)), bits)
    for first, last in row_ranges(start, stop, width, scales.device):
        skip = first % 8
        values = decode_rows(codes, scales, table, first - skip, last, width, group, bits, channels)
        out[first - start : last - start] = values[skip:]
    return out


def row_ranges(start: int, stop: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """start:stop in chunks; all but the first begin at multiples of 8 rows."""
    step = max(8, chunk(device) // max(width, 1) // 8 * 8)
    cuts = list(range(start // 8 * 8 + step, stop, step))
    return list(zip([start, *cuts], [*cuts, stop])) if stop > start else []


def _fake_decode_int8(codes, scales, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


@operator("decode_int8(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor", _fake_decode_int8, family="codes")
def decode_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (int8 [rows, width]) times scales ([rows, groups], of equal size)."""
    values = codes.to(dtype).unflatten(1, (scales.shape[1], -1))  # exact: a code has 8 bits
    return values.mul_(scales[..., None]).flatten(1)
