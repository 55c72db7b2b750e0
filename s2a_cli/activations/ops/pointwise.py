"""Elementwise functions keep a code of their derivative, not their input.

GELU, SiLU and the like keep `pointwise` bits an element; the gradient is grad * the code's entry in a codebook.
Functions of straight lines with two slopes (ReLU, ReLU6, hardtanh, LeakyReLU, hardsigmoid) keep one bit, and their
gradient is exact. Falls back to PyTorch for ReLU with random slopes, PReLU, thresholds, and inputs that are not real
floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.registry import register
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.packing import inverse, memory_order
from s2a_cli.activations.quant.primitives import activate, multiply_dequantized, pack_interval, quantize_elementwise

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


class Elementwise(torch.autograd.Function):
    """Computes y = run(x), in place or not; dx = grad * entries[code].

    The packed codes are those of x.permute(order), as it lies in memory.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        packed: Tensor,
        codebook: codebooks.Codebook,
        order: tuple[int, ...],
        run: Callable,
        inplace: bool,
    ):
        ctx.save_for_backward(packed)
        ctx.entries, ctx.bits, ctx.order = codebook.entries, codebook.bits, order
        out = run(x)
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (packed,) = ctx.saved_tensors
        product = multiply_dequantized(grad.permute(ctx.order), packed, ctx.entries, ctx.bits)
        return product.permute(inverse(ctx.order)), None, None, None, None, None


# The function's output where it was made along the way, packed codes, their codebook.
Encoded = tuple[Tensor | None, Tensor, codebooks.Codebook]
Functions = tuple[Callable, ...]
ONE_PASS = {  # functions that s2a::activate knows
    (F.gelu, "none"): "gelu",
    (F.gelu, "tanh"): "gelu_tanh",
    (F.silu, "none"): "silu",
    (F.hardswish, "none"): "hardswish",
}


def in_one_pass(x: Tensor) -> bool:
    """Returns whether a function and its codes are made in one pass over x.

    That is so where a kernel does it, whose output equals PyTorch's to rounding.
    """
    return x.is_cuda


def keep_codes(function: Callable, *names: str, also: Functions = (), inplace: Functions = ()) -> None:
    """Registers handlers that keep codes of the derivative of `function`.

    names: its further parameters, in order. also: other functions that are the same. inplace: those that change x.
    """

    def encode(op: OpContext, x: Tensor, parameters: dict, inplace: bool) -> Encoded:
        codebook = op.calibration.pointwise(op.site, function, parameters, op.bits("pointwise"), x)
        seed, known = op.calibration.seed(), ONE_PASS.get((function, parameters.get("approximate", "none")))
        if known and in_one_pass(x) and seed is None and not inplace:
            return *activate(x, known, codebook.bin_codes, codebook.low, codebook.high, codebook.bits), codebook
        laid = x.permute(memory_order(x))
        return (
            None,
            quantize_elementwise(
                laid, codebook.bin_codes, codebook.low, codebook.high, codebook.bits, codebook.chances, seed or 0
            ),
            codebook,
        )

    _register(encode, (function, *also), inplace, names, "pointwise")


def keep_side(slopes: Callable, functions: Functions, *names: str, inplace: Functions = ()) -> None:
    """Registers handlers that keep one bit: on which side x lies, of functions straight inside and outside an interval.

    slopes(**parameters) -> (low, high, slope outside, slope inside). names, inplace: as for `keep_codes`.
    """

    def encode(op: OpContext, x: Tensor, parameters: dict, inplace: bool) -> Encoded:
        low, high, outside, inside = slopes(**parameters)
        return None, pack_interval(x.permute(memory_order(x)), low, high), codebooks.slopes(outside, inside, x)

    _register(encode, functions, inplace, names, None)


def _register(
    encode: Callable, functions: Functions, inplace: Functions, names: tuple[str, ...], bits: str | None
) -> None:
    for called, is_inplace in ((functions, False), (inplace, True)):
        register(dict.fromkeys(called, _handler(encode, names, is_inplace)), bits, ("input", *names))


def _handler(encode: Callable, names: tuple[str, ...], inplace: bool) -> Callable:
    """Returns the handler of functions whose further parameters are `names`.

    inplace: whether they change x where no parameter says so.
    """

    def handler(op: OpContext, stock: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not covers(input):
            return NotImplemented
        parameters = dict(zip(names, args), **kwargs)
        changes_input = parameters.pop("inplace", inplace)
        out, packed, codebook = encode(op, input.detach(), parameters, changes_input)

        def run(x: Tensor) -> Tensor:
            return stock(x, *args, **kwargs) if out is None else out

        return Elementwise.apply(input, packed, codebook, memory_order(input), run, changes_input)

    return handler


def _relu() -> tuple[float, float, float, float]:
    return 0.0, math.inf, 0.0, 1.0


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float, float, float]:
    return min_val, max_val, 0.0, 1.0


def _leaky_relu(negative_slope: float = 0.01) -> tuple[float, float, float, float]:
    return 0.0, math.inf, negative_slope, 1.0


keep_codes(F.gelu, "approximate")
keep_codes(F.silu, "inplace")
keep_codes(F.mish, "inplace")
keep_codes(F.hardswish, "inplace")
keep_codes(F.elu, "alpha", "inplace")
keep_codes(F.celu, "alpha", "inplace")
keep_codes(F.selu, "inplace")
keep_codes(F.softplus, "beta", "threshold")
keep_codes(F.logsigmoid)
keep_codes(torch.sigmoid, also=(Tensor.sigmoid,), inplace=(torch.sigmoid_, Tensor.sigmoid_))
keep_codes(torch.tanh, also=(Tensor.tanh,), inplace=(torch.tanh_, Tensor.tanh_))

keep_side(_relu, (F.relu, torch.relu, Tensor.relu), "inplace", inplace=(torch.relu_, Tensor.relu_))
keep_side(lambda: (0.0, 6.0, 0.0, 1.0), (F.relu6,), "inplace")
keep_side(_hardtanh, (F.hardtanh,), "min_val", "max_val", "inplace")
keep_side(_hardtanh, (), "min_val", "max_val", inplace=(F.hardtanh_,))
keep_side(lambda: (-3.0, 3.0, 0.0, 1 / 6), (F.hardsigmoid,), "inplace")
keep_side(_leaky_relu, (F.leaky_relu,), "negative_slope", "inplace")
keep_side(_leaky_relu, (), "negative_slope", inplace=(F.leaky_relu_,))
