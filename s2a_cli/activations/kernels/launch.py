"""What calls the kernels: the same arguments and results as the plain operators of these names."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from s2a_cli.activations.codes import packed_size
from s2a_cli.activations.kernels import pointwise
from s2a_cli.activations.operators import PLAIN

BLOCK = 1024  # elements a program: 8 a thread, so 16-byte loads of bfloat16; it divides the size of most hidden layers
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # as PyTorch's own kernels are compiled
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def probe() -> None:
    """Raises where kernels cannot be built or launched."""
    encode_interval(torch.zeros(8, device="cuda"), 0.0, math.inf)


def _flat(total: int) -> tuple[tuple[int], dict]:
    """The grid and the last arguments of an elementwise kernel."""
    return (triton.cdiv(total, BLOCK),), {"BLOCK": BLOCK, "EVEN": total % BLOCK == 0, **OPTIONS}


def _packed(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def activate(x: Tensor, function: str, bins: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """Plain: float64."""
    if x.dtype not in FLOATS or x.numel() == 0:
        return PLAIN["activate"](x, function, bins, low, high, bits)
    y = x.new_empty(x.shape)
    return y, _encode(x.contiguous(), y, function, bins, low, high, bits)


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
