"""Launches the kernels, with the arguments and results of the PyTorch operators of the same names.

Each function falls back to PyTorch for what its docstring lists, all of them for float64 and empty tensors.
"""

# A type checker takes what a kernel is launched with for the arguments of a plain call.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2a_cli.activations.kernels import grouped, pointwise, ragged
from s2a_cli.activations.kernels.pooling import max_pool2d, max_pool2d_backward  # noqa: F401 (as the other operators)
from s2a_cli.activations.quant.packing import groups_per_row, memory_order, packed_size
from s2a_cli.activations.quant.primitives import PLAIN, SCALE, row_ranges

BLOCK = 1024  # elements a program: 8 a thread, so 16-byte loads of bfloat16; it divides the size of most hidden layers
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # as PyTorch's own kernels are compiled
TILE, WIDEST = 1024, 8192  # elements that a warp has of rows with groups, at least a row; those of the longest row
EACH = 4  # tiles that a program codes one after the other: fewer programs to start
PROGRAMS = 512  # that share the rows of a backward pass: a few a multiprocessor, the same number on every device
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def probe() -> None:
    """Raises where kernels cannot be built or launched: also where Triton cannot round to bfloat16 (Turing, Triton
    3.2).
    """
    quantize_groupwise(
        torch.zeros(1, 64, device="cuda"), torch.zeros(16, dtype=torch.uint8, device="cuda"), -1.0, 64, 4
    )


def _flat(total: int) -> tuple[tuple[int], dict]:
    """Returns the grid and the last arguments of an elementwise kernel."""
    return (triton.cdiv(total, BLOCK),), {"BLOCK": BLOCK, "EVEN": total % BLOCK == 0, **OPTIONS}


def _packed(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def activate(x: Tensor, function: str, bin_codes: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """Falls back to PyTorch for float64."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return PLAIN["activate"](x, function, bin_codes, low, high, bits)
    order = memory_order(x)
    y = torch.empty_like(x) if x.permute(order).is_contiguous() else x.new_empty(x.shape)
    return y, _encode(x.permute(order).contiguous(), y.permute(order), function, bin_codes, low, high, bits)


def quantize_elementwise(
    x: Tensor, bin_codes: Tensor, low: float, high: float, bits: int, chances: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Falls back to PyTorch for float64 and stochastic rounding."""
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None:
        return PLAIN["quantize_elementwise"](x, bin_codes, low, high, bits, chances, seed)
    x = x.contiguous()
    return _encode(x, x, None, bin_codes, low, high, bits)


def _encode(
    x: Tensor, y: Tensor, function: str | None, bin_codes: Tensor, low: float, high: float, bits: int
) -> Tensor:
    packed, (grid, layout) = _packed(x, bits), _flat(x.numel())
    step = bin_codes.numel() / (high - low)
    pointwise.encode[grid](
        x, y, packed, bin_codes, x.numel(), step, -low * step, function, bin_codes.numel(), bits, **layout
    )
    return packed


def pack_interval(x: Tensor, low: float, high: float) -> Tensor:
    """Falls back to PyTorch for float64."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return PLAIN["pack_interval"](x, low, high)
    packed, (grid, layout) = _packed(x, 1), _flat(x.numel())
    bounds = torch.tensor([low, high], dtype=x.dtype).tolist()  # as PyTorch compares: in the type of x
    pointwise.interval[grid](x.contiguous(), packed, x.numel(), *bounds, high != math.inf, **layout)
    return packed


def multiply_dequantized(grad: Tensor, packed: Tensor, entries: Tensor, bits: int) -> Tensor:
    """Falls back to PyTorch for float64."""
    if grad.dtype not in FLOATS or grad.numel() == 0:
        return PLAIN["multiply_dequantized"](grad, packed, entries, bits)
    out, (grid, layout) = grad.new_empty(grad.shape), _flat(grad.numel())
    pointwise.multiply[grid](grad.contiguous(), out, packed, entries, grad.numel(), bits, **layout)
    return out


def _tiles(width: int, group_size: int, warp: int = TILE, warps: int = 1) -> dict | None:
    """Returns the last arguments of a kernel on rows of `width`; None where it does not cover them.

    warp: elements a warp.
    """
    cols = triton.next_power_of_2(width)
    group_size = cols if group_size >= width else group_size
    if width % 8 or cols > WIDEST or group_size != triton.next_power_of_2(group_size):
        return None
    rows = max(1, warp * warps // cols)
    return {
        "WIDTH": width,
        "GROUP": group_size,
        "ROWS": rows,
        "COLS": cols,
        **OPTIONS,
        "num_warps": max(warps, cols // warp),
    }


def _ragged(width: int, group_size: int) -> dict | None:
    """Returns the last arguments of a kernel on rows of any `width`; None where it does not cover them."""
    cols = triton.next_power_of_2(width)
    group_size = cols if group_size >= width else group_size
    if cols > WIDEST // 4 or group_size != triton.next_power_of_2(group_size):
        return None
    rows = max(8, 2 * TILE // cols)
    return {
        "WIDTH": width,
        "GROUP": group_size,
        "ROWS": rows,
        "COLS": cols,
        **OPTIONS,
        "num_warps": max(4, rows * cols // TILE),
    }


def _layout(x: Tensor) -> tuple[int, ...] | None:
    """Returns where the rows of x begin, as `grouped.encode` takes it: inner, middle, near, far, outer.

    None where these five numbers cannot say it.
    """
    dims = []  # (size, stride) of the leading dimensions, the last first, those that lie one after the other as one
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = dims[-1][0] * size, dims[-1][1]
        else:
            dims.append((size, stride))
    rows = x.numel() // x.shape[-1]
    if x.stride(-1) != 1 or len(dims) > 3 or rows >= 2**31 or any(size * stride >= 2**31 for size, stride in dims[:2]):
        return None
    (inner, near), (middle, far), (_, outer) = dims + [(1, 0)] * (3 - len(dims))
    return inner, middle, near, far, outer


def _shortest(width: int, group_size: int, channels: Tensor | None) -> int:
    """Returns the width that contiguous rows may be read as: that of a group, where groups are all alike."""
    return group_size if channels is None and width % group_size == 0 else width


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
    """Falls back to PyTorch for float64, stochastic rounding, group sizes that are no power of two, and long rows.

    Long are rows of over 8192 elements, or of over 2048 and no multiple of 8.
    """
    width, total = x.shape[-1], math.prod(x.shape[:-1])
    tiles = _tiles(_shortest(width, group_size, channels) if x.is_contiguous() else width, group_size)
    whole = _ragged(width, group_size) if tiles is None and channels is None and hasattr(tl, "gather") else None
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None or tiles is whole is None:
        return PLAIN["quantize_groupwise"](x, bin_codes, low, group_size, bits, chances, seed, channels)
    scales = x.new_empty((total, groups_per_row(width, group_size)), dtype=SCALE)
    if whole is None:
        assert tiles is not None
        return _quantize_rows(x, scales, scales, None, bin_codes, low, 0.0, bits, channels, tiles), scales
    packed, step = _packed(x, bits), bin_codes.numel() / (1.0 - low)
    flat = triton.next_power_of_2(whole["ROWS"] * width)
    layout = low < 0, bin_codes.numel()
    ragged.encode[triton.cdiv(total, whole["ROWS"]),](
        x.contiguous(), packed, scales, bin_codes, total, step, -low * step, *layout, BITS=bits, FLAT=flat, **whole
    )
    return packed, scales


def quantize_normalized(
    x: Tensor,
    width: int,
    eps: float,
    centre: bool,
    bin_codes: Tensor,
    group_size: int,
    bits: int,
    chances: Tensor | None = None,
    seed: int = 0,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Falls back to PyTorch for float64, stochastic rounding, group sizes that are no power of two, and some rows.

    These are rows of over 8192 elements, or of no multiple of 8.
    """
    tiles = _tiles(width, group_size)
    x = x if x.shape[-1] == width else x.contiguous().view(-1, width)
    if x.dtype not in FLOATS or x.numel() == 0 or chances is not None or tiles is None:
        return PLAIN["quantize_normalized"](x, width, eps, centre, bin_codes, group_size, bits, chances, seed, channels)
    total = x.numel() // width
    scales = x.new_empty((total, groups_per_row(width, group_size)), dtype=SCALE)
    rstd = x.new_empty(total, dtype=torch.float32)
    norm = "layer" if centre else "rms"
    return _quantize_rows(x, scales, rstd, norm, bin_codes, -1.0, eps, bits, channels, tiles), scales, rstd


def _quantize_rows(
    x: Tensor,
    scales: Tensor,
    rstd: Tensor,
    norm: str | None,
    bin_codes: Tensor,
    low: float,
    eps: float,
    bits: int,
    channels: Tensor | None,
    tiles: dict,
) -> Tensor:
    packed, step = _packed(x, bits), bin_codes.numel() / (1.0 - low)
    layout = None if x.is_contiguous() else _layout(x)
    x = x.contiguous() if layout is None else x
    rows = x.numel() // tiles["WIDTH"]
    grouped.encode[triton.cdiv(rows, tiles["ROWS"] * EACH),](
        x,
        packed,
        scales,
        rstd,
        bin_codes,
        bin_codes if channels is None else channels,
        rows,
        eps,
        step,
        -low * step,
        *(layout or (0,) * 5),
        layout is not None,
        norm,
        low < 0,
        channels is not None,
        bin_codes.numel(),
        BITS=bits,
        EACH=EACH,
        **tiles,
    )
    return packed


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
    """Falls back to PyTorch for float64."""
    out = scales.new_empty((stop - start, width), dtype=dtype)
    if dtype not in FLOATS or out.numel() == 0:
        return PLAIN["dequantize_groupwise"](
            packed, scales, entries, width, group_size, bits, start, stop, dtype, channels
        )
    known = entries if channels is None else channels
    tiles = _tiles(_shortest(width, group_size, channels), group_size)
    if tiles is None:
        span = scales.shape[0] * width, start * width, stop * width
        layout = channels is not None, width, min(group_size, width), bits, BLOCK
        programs = triton.cdiv(span[2], BLOCK) - span[1] // BLOCK
        ragged.decode[programs,](out, packed, scales, entries, known, *span, *layout, **OPTIONS)
        return out
    each = width // tiles["WIDTH"]
    rows, start, stop = scales.shape[0] * each, start * each, stop * each
    grouped.decode[triton.cdiv(stop - start, tiles["ROWS"] * EACH),](
        out,
        packed,
        scales,
        entries,
        known,
        rows,
        start,
        stop,
        channels is not None,
        BITS=bits,
        EACH=EACH,
        **tiles,
    )
    return out


def norm_backward(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    rstd: Tensor,
    entries: Tensor,
    weight: Tensor | None,
    width: int,
    channels: int,
    count: int,
    centre: bool,
    group_size: int,
    bits: int,
    calibrated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Falls back to PyTorch as quantize_normalized does, and for a channel of several elements of a row (GroupNorm)."""
    tiles = _tiles(width, group_size, TILE // 2, 4)  # sums by channel are registers, too
    if grad.dtype not in FLOATS or grad.numel() == 0 or not width == channels == count or tiles is None:
        layout = width, channels, count, centre, group_size, bits, calibrated
        return PLAIN["norm_backward"](grad, packed, scales, rstd, entries, weight, *layout)
    out, rows = grad.new_empty(grad.shape), rstd.numel()
    programs = min(PROGRAMS, triton.cdiv(rows, tiles["ROWS"]))
    sums = grad.new_empty((2, programs, width), dtype=torch.float32)
    unused = rstd
    grouped.norm_backward[programs,](
        grad.contiguous(),
        out,
        sums,
        packed,
        scales,
        rstd,
        entries,
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


def softmax_backward(
    grad: Tensor, packed: Tensor, scales: Tensor, entries: Tensor, group_size: int, bits: int
) -> Tensor:
    """Falls back to PyTorch for float64, group sizes that are no power of two, and rows of over 2048 elements."""
    width, out = grad.shape[-1], grad.new_empty(grad.shape)
    tiles = _ragged(width, group_size)
    if grad.dtype not in FLOATS or grad.numel() == 0 or tiles is None:
        return PLAIN["softmax_backward"](grad, packed, scales, entries, group_size, bits)
    rows = scales.shape[0]
    tiles |= {"ROWS": max(1, 2 * TILE // tiles["COLS"]), "num_warps": 4}
    grid = (triton.cdiv(rows, tiles["ROWS"]),)
    ragged.softmax_backward[grid](grad.contiguous(), out, packed, scales, entries, rows, BITS=bits, **tiles)
    return out


def weight_gradient(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    entries: Tensor,
    width: int,
    group_size: int,
    bits: int,
    channels: Tensor | None = None,
) -> Tensor:
    """Falls back to PyTorch for float64.

    Rows are dequantized by a kernel and multiplied by the library's matmul. A fused kernel would dequantize them again
    for each tile of the result's rows: 24 times for 3072 of them, with more instructions than the matmul itself has.
    """
    if grad.dtype not in FLOATS or grad.numel() == 0:
        return PLAIN["weight_gradient"](grad, packed, scales, entries, width, group_size, bits, channels)
    flat = grad.reshape(-1, grad.shape[-1])
    total: Any = None
    for start, stop in row_ranges(0, len(flat), width, grad.device):
        x = dequantize_groupwise(packed, scales, entries, width, group_size, bits, start, stop, grad.dtype, channels)
        part = flat[start:stop].mT @ x
        total = part.float() if total is None else total.add_(part)
    return total.to(grad.dtype)


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Falls back to PyTorch for float64."""
    if dtype not in FLOATS or codes.numel() == 0:
        return PLAIN["dequantize_int8"](codes, scales, dtype)
    out, total = codes.new_empty(codes.shape, dtype=dtype), codes.numel()
    grid, group_size = (triton.cdiv(total, BLOCK),), codes.shape[1] // scales.shape[1]
    ragged.decode_int8[grid](out, codes.contiguous(), scales, total, group_size, BLOCK, **OPTIONS)
    return out
