"""Defines custom operators that quantize and dequantize: to a trace each is one node, with small temporaries.

    s2a::quantize_elementwise   x -> packed codes of a codebook
    s2a::activate               x -> an activation function of x, and what quantize_elementwise gives
    s2a::pack_interval          x -> 1 bit an element: low < x < high
    s2a::multiply_dequantized   gradient * the entry of each code
    s2a::quantize_groupwise     x -> packed codes and scales, `group_size` elements of the last dimension a scale
    s2a::dequantize_groupwise   the rows start:stop of what quantize_groupwise was given
    s2a::dequantize_int8        codes * scale, of frozen weights

Optional arguments: `chances` of a codebook and a `seed` round stochastically; `channels` [3, width], float32, a shift,
a factor and what with_inverse adds: (x - shift) / factor is what is coded. These are the PyTorch implementations, for
every device; `kernels` has a second one of most for CUDA. The operators are not differentiable: the autograd functions
of the operator families call them, and those families define further ones, with `operator`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from s2a_cli.activations.chunk_sizes import chunk_sizes
from s2a_cli.activations.quant.packing import (
    byte_table,
    elements,
    groups_per_row,
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
    """Returns the dtype that dequantized values are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RoundingDraws:
    """Draws uniform 16-bit integers from a seed of their own.

    The global generators go on as if nothing had been drawn.
    """

    def __init__(self, chances: Tensor, seed: int):
        self.chances = chances
        self.generator = torch.Generator(chances.device).manual_seed(seed)

    def above(self, index: Tensor) -> Tensor:
        """Returns 1 with the chance of each bin of `index`, else 0: uint8."""
        words = torch.empty(-(-index.numel() // 4), dtype=torch.int64, device=index.device)
        drawn = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: index.numel()]
        return (drawn < self.chances.index_select(0, index)).view(torch.uint8)


def draws(chances: Tensor | None, seed: int) -> RoundingDraws | None:
    return None if chances is None else RoundingDraws(chances, seed)


def assign(x: Tensor, bin_codes: Tensor, low: float, high: float, up: RoundingDraws | None = None) -> Tensor:
    """Returns the codes (uint8) of a small float32 tensor; NaN gets some code, infinities that of the outermost bin."""
    step = bin_codes.numel() / (high - low)
    index = (x * step).add_(-low * step).clamp_(0, bin_codes.numel() - 1)
    index = index.to(torch.int32).bitwise_and_(bin_codes.numel() - 1).view(-1)  # NaN may turn into any integer
    codes = torch.index_select(bin_codes, 0, index)
    return codes if up is None else codes.add_(up.above(index))


def with_inverse(channels: Tensor) -> Tensor:
    """Returns the shift and factor of each channel [2, width], and 1 / factor, so that quantizing needs no division."""
    return torch.cat([channels, channels[1:].reciprocal()])


def _fake_codes(x, bits):
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def _fake_quantize_elementwise(x, bin_codes, low, high, bits, chances=None, seed=0):
    return _fake_codes(x, bits)


@operator(
    "quantize_elementwise(Tensor x, Tensor bin_codes, float low, float high, int bits, Tensor? chances=None, "
    "int seed=0) -> Tensor",
    _fake_quantize_elementwise,
    family="activation",
)
def quantize_elementwise(
    x: Tensor, bin_codes: Tensor, low: float, high: float, bits: int, chances: Tensor | None = None, seed: int = 0
) -> Tensor:
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    up = draws(chances, seed)
    for start, span in elements(x):
        pack_into(packed, start, assign(span.float(), bin_codes, low, high, up), bits, x.numel())
    return packed


def _fake_activate(x, function, bin_codes, low, high, bits):
    return torch.empty_like(x), _fake_codes(x, bits)


@operator(
    "activate(Tensor x, str function, Tensor bin_codes, float low, float high, int bits) -> (Tensor, Tensor)",
    _fake_activate,
    family="activation",
)
def activate(x: Tensor, function: str, bin_codes: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the function of ACTIVATIONS by that name, and the packed codes of x as it lies in memory."""
    return ACTIVATIONS[function](x), PLAIN["quantize_elementwise"](
        x.permute(memory_order(x)), bin_codes, low, high, bits
    )


def _fake_pack_interval(x, low, high):
    return _fake_codes(x, 1)


@operator("pack_interval(Tensor x, float low, float high) -> Tensor", _fake_pack_interval, family="activation")
def pack_interval(x: Tensor, low: float, high: float) -> Tensor:
    packed = x.new_empty(packed_size(x.numel(), 1), dtype=torch.uint8)
    for start, span in elements(x):
        inside = span > low
        if high != math.inf:
            inside &= span < high
        pack_into(packed, start, inside, 1, x.numel())
    return packed


def _fake_multiply_dequantized(grad, packed, entries, bits):
    return grad.new_empty(grad.shape)


@operator(
    "multiply_dequantized(Tensor grad, Tensor packed, Tensor entries, int bits) -> Tensor",
    _fake_multiply_dequantized,
    family="activation",
)
def multiply_dequantized(grad: Tensor, packed: Tensor, entries: Tensor, bits: int) -> Tensor:
    out = grad.new_empty(grad.shape)
    flat = out.view(-1)
    table = byte_table(entries.to(working_type(grad.dtype)), bits)
    for start, span in elements(grad):
        stop = start + span.numel()
        torch.mul(span, lookup(packed, start, stop, table, bits, grad.numel()), out=flat[start:stop])
    return out


def quantize_rows(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    start: int,
    total: int,
    bin_codes: Tensor,
    low: float,
    group_size: int,
    bits: int,
    up: RoundingDraws | None = None,
) -> None:
    """Writes codes of a small float32 x [r, width] into `packed` and `scales`.

    x is the rows from `start` of a tensor of `total` rows.
    """
    count, width = x.shape
    group_size = min(group_size, width)
    short = -width % group_size
    grouped = (torch.nn.functional.pad(x, (0, short)) if short else x).view(count, -1, group_size)
    scale = grouped.amax(-1)
    if low < 0:  # the element of the largest magnitude, with its sign
        least = grouped.amin(-1)
        scale = torch.where(scale > -least, scale, least)
    if up is not None:  # as it will be read no smaller than the element: no entry lies beyond 1
        scale = scale * (1 + 2.0**-8)
    scales[start : start + count] = scale
    factor = scales[start : start + count].float().reciprocal_()  # of the scale as it will be read
    codes = assign(grouped * factor.nan_to_num_(0, 0, 0)[..., None], bin_codes, low, 1.0, up)
    if short:
        codes = codes.view(count, -1)[:, :width].reshape(-1)
    pack_into(packed, start * width, codes, bits, total * width)


def dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    start: int,
    stop: int,
    width: int,
    group_size: int,
    bits: int,
    channels: Tensor | None = None,
) -> Tensor:
    """Returns the values [stop - start, width] of the rows start:stop, of the byte table's type.

    `start` is a multiple of 8.
    """
    values = lookup(packed, start * width, stop * width, table, bits, scales.shape[0] * width).view(-1, width)
    scale = scales[start:stop].to(table.dtype)
    group_size = min(group_size, width)
    if width % group_size == 0:
        values.view(stop - start, -1, group_size).mul_(scale[..., None])
    else:
        values.mul_(scale.repeat_interleave(group_size, 1)[:, :width])
    if channels is not None:
        shift, factor = channels[:2].to(table.dtype)
        torch.addcmul(shift, values, factor, out=values)
    return values


def _fake_quantize_groupwise(x, bin_codes, low, group_size, bits, chances=None, seed=0, channels=None):
    width = x.shape[-1]
    scales = x.new_empty((math.prod(x.shape[:-1]), groups_per_row(width, group_size)), dtype=SCALE)
    return _fake_codes(x, bits), scales


@operator(
    "quantize_groupwise(Tensor x, Tensor bin_codes, float low, int group_size, int bits, Tensor? chances=None, "
    "int seed=0, Tensor? channels=None) -> (Tensor, Tensor)",
    _fake_quantize_groupwise,
    family="codes",
)
def quantize_groupwise(
    x: Tensor,
    bin_codes: Tensor,
    low: float,
    group_size: int,
    bits: int,
    chances: Tensor | None = None,
    seed: int = 0,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    total = math.prod(x.shape[:-1])
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    scales = x.new_empty((total, groups_per_row(width, group_size)), dtype=SCALE)
    up = draws(chances, seed)
    for start, span in rows(x, width):
        span = span.float()
        if channels is not None:
            span = (span - channels[0]).mul_(channels[2])
        quantize_rows(span, packed, scales, start, total, bin_codes, low, group_size, bits, up)
    return packed, scales


def _fake_dequantize_groupwise(packed, scales, entries, width, group_size, bits, start, stop, dtype, channels=None):
    return scales.new_empty((stop - start, width), dtype=dtype)


@operator(
    "dequantize_groupwise(Tensor packed, Tensor scales, Tensor entries, int width, int group_size, int bits, "
    "int start, int stop, ScalarType dtype, Tensor? channels=None) -> Tensor",
    _fake_dequantize_groupwise,
    family="codes",
)
def dequantize_groupwise(
    packed: Tensor,
    scales: Tensor,
    entries: Tensor,
    width: int,
    group_size: int,
    bits: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    channels: Tensor | None = None,
) -> Tensor:
    out = scales.new_empty((stop - start, width), dtype=dtype)
    table = byte_table(entries.to(working_type(dtype)), bits)
    for first, last in row_ranges(start, stop, width, scales.device):
        skip = first % 8
        values = dequantize_rows(packed, scales, table, first - skip, last, width, group_size, bits, channels)
        out[first - start : last - start] = values[skip:]
    return out


def row_ranges(start: int, stop: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Returns start:stop in short ranges; all but the first begin at multiples of 8 rows."""
    step = max(8, chunk_sizes(device).temporary // max(width, 1) // 8 * 8)
    cuts = list(range(start // 8 * 8 + step, stop, step))
    return list(zip([start, *cuts], [*cuts, stop])) if stop > start else []


def _fake_dequantize_int8(codes, scales, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


@operator(
    "dequantize_int8(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor", _fake_dequantize_int8, family="codes"
)
def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes (int8 [rows, width]) times scales ([rows, groups], of equal size)."""
    values = codes.to(dtype).unflatten(1, (scales.shape[1], -1))  # exact: a code has 8 bits
    return values.mul_(scales[..., None]).flatten(1)
