"""What calls the kernels: the same arguments and results as the plain operators of these names."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from s2a_cli.activations.codes import groups_of, memory_order, packed_size
from s2a_cli.activations.kernels import grouped, pointwise
from s2a_cli.activations.operators import PLAIN, SCALE

BLOCK = 1024  # elements a program: 8 a thread, so 16-byte loads of bfloat16; it divides the size of most hidden layers
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # as PyTorch's own kernels are compiled
TILE, WIDEST = 2048, 8192  # elements a program where rows have groups, at least a row; those of the longest row
PROGRAMS = 512  # that share the rows of a backward pass: a few a multiprocessor, the same number on every device
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def probe() -> None:
    """Raises where kernels cannot be built or launched: also where Triton cannot round to bfloat16 (Turing, Triton 3.2)."""
    encode_groups(torch.zeros(1, 64, device="cuda"), torch.zeros(16, dtype=torch.uint8, device="cuda"), -1.0, 64, 4)


def _flat(total: int) -> tuple[tuple[int], dict]:
    """The grid and the last arguments of an elementwise kernel."""
    return (triton.cdiv(total, BLOCK),), {"BLOCK": BLOCK, "EVEN": total % BLOCK == 0, **OPTIONS}


def _packed(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def activate(x: Tensor, function: str, bins: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """Plain: float64."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return PLAIN["activate"](x, function, bins, low, high, bits)
    order = memory_order(x)
    y = torch.empty_like(x) if x.permute(order).is_contiguous() else x.new_empty(x.shape)
    return y, _encode(x.permute(order).contiguous(), y.permute(order), function, bins, low, high, bits)


def encode_levels(
    x: Tensor, bins: Tensor, low: float, high: float, bits: int, chances: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Plain: float64, stochastic rounding."""
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None:
        return PLAIN["encode_levels"](x, bins, low, high, bits, chances, seed)
    x = x.contiguous()
    return _encode(x, x, None, bins, low, high, bits)


def _encode(x: Tensor, y: Tensor, function: str | None, bins: Tensor, low: float, high: float, bits: int) -> Tensor:
    packed, (grid, layout) = _packed(x, bits), _flat(x.numel())
    step = bins.numel() / (high - low)
    pointwise.encode[grid](x, y, packed, bins, x.numel(), step, -low * step, function, bins.numel(), bits, **layout)
    return packed


def encode_interval(x: Tensor, low: float, high: float) -> Tensor:
    """Plain: float64."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return PLAIN["encode_interval"](x, low, high)
    packed, (grid, layout) = _packed(x, 1), _flat(x.numel())
    bounds = torch.tensor([low, high], dtype=x.dtype).tolist()  # as PyTorch compares: in the type of x
    pointwise.interval[grid](x.contiguous(), packed, x.numel(), *bounds, high != math.inf, **layout)
    return packed


def multiply_levels(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Plain: float64."""
    if grad.dtype not in FLOATS or grad.numel() == 0:
        return PLAIN["multiply_levels"](grad, codes, levels, bits)
    out, (grid, layout) = grad.new_empty(grad.shape), _flat(grad.numel())
    pointwise.multiply[grid](grad.contiguous(), out, codes, levels, grad.numel(), bits, **layout)
    return out


def _tiles(width: int, group: int) -> dict | None:
    """The last arguments of a kernel on rows of `width`; None where it does not cover them."""
    cols = triton.next_power_of_2(width)
    group = cols if group >= width else group
    if width % 8 or cols > WIDEST or group != triton.next_power_of_2(group):
        return None
    rows = max(1, TILE // cols)
    return {"WIDTH": width, "GROUP": group, "ROWS": rows, "COLS": cols, **OPTIONS, "num_warps": max(4, cols // 512)}


def _shortest(width: int, group: int, channels: Tensor | None) -> int:
    """The width that rows may be read as: that of a group, where groups are all alike."""
    return group if channels is None and width % group == 0 else width


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
    """Plain: float64, stochastic rounding; where groups do not fill rows, groups of no power of two, rows of over
    8192 elements; and rows, or groups that fill rows, of no multiple of 8."""
    width, total = x.shape[-1], math.prod(x.shape[:-1])
    tiles = _tiles(_shortest(width, group, channels), group)
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None or tiles is None:
        return PLAIN["encode_groups"](x, bins, low, group, bits, chances, seed, channels)
    scales = x.new_empty((total, groups_of(width, group)), dtype=SCALE)
    return _encode_rows(x, scales, scales, None, bins, low, 0.0, bits, channels, tiles), scales


def encode_norm(
    x: Tensor,
    width: int,
    eps: float,
    centre: bool,
    bins: Tensor,
    group: int,
    bits: int,
    chances: Tensor | None = None,
    seed: int = 0,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain: float64, stochastic rounding, rows of over 8192 elements or no multiple of 8, groups of no power of two."""
    tiles = _tiles(width, group)
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None or tiles is None:
        return PLAIN["encode_norm"](x, width, eps, centre, bins, group, bits, chances, seed, channels)
    total = x.numel() // width
    scales = x.new_empty((total, groups_of(width, group)), dtype=SCALE)
    rstd = x.new_empty(total, dtype=torch.float32)
    norm = "layer" if centre else "rms"
    return _encode_rows(x, scales, rstd, norm, bins, -1.0, eps, bits, channels, tiles), scales, rstd


def _encode_rows(
    x: Tensor,
    scales: Tensor,
    rstd: Tensor,
    norm: str | None,
    bins: Tensor,
    low: float,
    eps: float,
    bits: int,
    channels: Tensor | None,
    tiles: dict,
) -> Tensor:
    packed, rows = _packed(x, bits), x.numel() // tiles["WIDTH"]
    step = bins.numel() / (1.0 - low)
    x, table = x.contiguous(), bins if channels is None else channels
    numbers = rows, eps, step, -low * step
    grouped.encode[triton.cdiv(rows, tiles["ROWS"]),](
        x,
        packed,
        scales,
        rstd,
        bins,
        table,
        *numbers,
        norm,
        low < 0,
        channels is not None,
        bins.numel(),
        BITS=bits,
        **tiles,
    )
    return packed


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
    """Plain: as encode_groups."""
    out = scales.new_empty((stop - start, width), dtype=dtype)
    tiles = _tiles(_shortest(width, group, channels), group)
    if dtype not in FLOATS or out.numel() == 0 or tiles is None:
        return PLAIN["decode_groups"](codes, scales, levels, width, group, bits, start, stop, dtype, channels)
    each = width // tiles["WIDTH"]
    rows, start, stop = scales.shape[0] * each, start * each, stop * each
    grouped.decode[triton.cdiv(stop - start, tiles["ROWS"]),](
        out,
        codes,
        scales,
        levels,
        levels if channels is None else channels,
        rows,
        start,
        stop,
        channels is not None,
        BITS=bits,
        **tiles,
    )
    return out


def norm_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    table: Tensor,
    weight: Tensor | None,
    width: int,
    channels: int,
    count: int,
    centre: bool,
    group: int,
    bits: int,
    calibrated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain: as encode_norm, and where a channel is more than one element of a row (GroupNorm)."""
    tiles = _tiles(width, group)
    if grad.dtype not in FLOATS or grad.numel() == 0 or not width == channels == count or tiles is None:
        layout = width, channels, count, centre, group, bits, calibrated
        return PLAIN["norm_backward"](grad, codes, scales, rstd, table, weight, *layout)
    out, rows = grad.new_empty(grad.shape), rstd.numel()
    programs = min(PROGRAMS, triton.cdiv(rows, tiles["ROWS"]))
    sums = grad.new_empty((2, programs, width), dtype=torch.float32)
    unused = rstd
    grouped.norm_backward[programs,](
        grad.contiguous(),
        out,
        sums,
        codes,
        scales,
        rstd,
        table,
        unused if weight is None else weight.contiguous(),
        unused if calibrated is None else calibrated,
        rows,
        centre,
        weight is not None,
        calibrated is not None,
        BITS=bits,
        **tiles,
    )
    dweight, dbias = sums.sum(1).to(grad.dtype)
    return out, dweight, dbias
