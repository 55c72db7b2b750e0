"""Elementwise functions: kept is a code of the derivative, not the input.

GELU, SiLU and the like keep `pointwise` bits an element; the gradient is grad * level. Functions of straight pieces
with two slopes (ReLU, ReLU6, hardtanh, LeakyReLU, hardsigmoid) keep one bit, and their gradient is exact.
Not covered, so stock: ReLU with random slopes, PReLU, thresholds, and inputs that are not real floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.packing import inverse, memory_order
from s2a_cli.activations.quant.primitives import activate, encode_interval, encode_levels, multiply_levels

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


class Elementwise(torch.autograd.Function):
    """y = run(x), in place or not; dx = grad * levels[code].

    The codes are those of x.permute(order), as it lies in memory.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, codes: Tensor, table: codebooks.Table, order: tuple[int, ...], run: Callable, inplace: bool
    ):
        ctx.save_for_backward(codes)
        ctx.levels, ctx.bits, ctx.order = table.levels, table.bits, order
        out = run(x)
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (codes,) = ctx.saved_tensors
        product = multiply_levels(grad.permute(ctx.order), codes, ctx.levels, ctx.bits)
        return product.permute(inverse(ctx.order)), None, None, None, None, None


Encoded = tuple[
    Tensor | None, Tensor, codebooks.Table
]  # the function's output where it was made along the way, codes, table
ONE_PASS = {  # functions that s2a::activate knows
    (F.gelu, "none"): "gelu",
    (F.gelu, "tanh"): "gelu_tanh",
    (F.silu, "none"): "silu",
    (F.hardswish, "none"): "hardswish",
}


def in_one_pass(x: Tensor) -> bool:
    """Whether the function and its codes are made in one pass over x: where a kernel does it, equal to stock to
    rounding.
    """
    return x.is_cuda


def coded(function: Callable, *names: str, inplace: bool = False) -> Callable:
    """A handler that keeps codes of the derivative of `function`, whose further parameters are `names`."""

    def encode(op: OpContext, x: Tensor, parameters: dict, inplace: bool) -> Encoded:
        table = op.calibration.pointwise(op.site, function, parameters, op.config.pointwise, x)
        seed, known = op.calibration.seed(), ONE_PASS.get((function, parameters.get("approximate", "none")))
        if known and in_one_pass(x) and seed is None and not inplace:
            return *activate(x, known, table.bins, table.low, table.high, table.bits), table
        laid = x.permute(memory_order(x))
        return None, encode_levels(laid, table.bins, table.low, table.high, table.bits, table.chances, seed or 0), table

    return _handler(encode, names, inplace)


def two_slopes(slopes: Callable, *names: str, inplace: bool = False) -> Callable:
    """A handler for a function that is straight inside and outside of an open interval.

    slopes(**parameters) -> (low, high, slope outside, slope inside).
    """

    def encode(op: OpContext, x: Tensor, parameters: dict, inplace: bool) -> Encoded:
        low, high, outside, inside = slopes(**parameters)
        return None, encode_interval(x.permute(memory_order(x)), low, high), codebooks.slopes(outside, inside, x)

    return _handler(encode, names, inplace)


def _handler(encode: Callable, names: tuple[str, ...], inplace: bool) -> Callable:
    def handler(op: OpContext, stock: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not covers(input):
            return NotImplemented
        parameters = dict(zip(names, args), **kwargs)
        changes_input = parameters.pop("inplace", inplace)
        out, codes, table = encode(op, input.detach(), parameters, changes_input)

        def run(x: Tensor) -> Tensor:
            return stock(x, *args, **kwargs) if out is None else out

        return Elementwise.apply(input, codes, table, memory_order(input), run, changes_input)

    handler.keywords = frozenset(("input", *names))
    return handler


def _relu() -> tuple[float, float, float, float]:
    return 0.0, math.inf, 0.0, 1.0


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float, float, float]:
    return min_val, max_val, 0.0, 1.0


def _leaky_relu(negative_slope: float = 0.01) -> tuple[float, float, float, float]:
    return 0.0, math.inf, negative_slope, 1.0


HANDLERS = {
    "pointwise": {
        F.gelu: coded(F.gelu, "approximate"),
        F.silu: coded(F.silu, "inplace"),
        F.mish: coded(F.mish, "inplace"),
        F.hardswish: coded(F.hardswish, "inplace"),
        F.elu: coded(F.elu, "alpha", "inplace"),
        F.celu: coded(F.celu, "alpha", "inplace"),
        F.selu: coded(F.selu, "inplace"),
        F.softplus: coded(F.softplus, "beta", "threshold"),
        F.logsigmoid: coded(F.logsigmoid),
        **{f: coded(torch.sigmoid) for f in (torch.sigmoid, Tensor.sigmoid)},
        **{f: coded(torch.sigmoid, inplace=True) for f in (torch.sigmoid_, Tensor.sigmoid_)},
        **{f: coded(torch.tanh) for f in (torch.tanh, Tensor.tanh)},
        **{f: coded(torch.tanh, inplace=True) for f in (torch.tanh_, Tensor.tanh_)},
    },
    None: {
        **{f: two_slopes(_relu, "inplace") for f in (F.relu, torch.relu, Tensor.relu)},
        **{f: two_slopes(_relu, inplace=True) for f in (torch.relu_, Tensor.relu_)},
        F.relu6: two_slopes(lambda: (0.0, 6.0, 0.0, 1.0), "inplace"),
        F.hardtanh: two_slopes(_hardtanh, "min_val", "max_val", "inplace"),
        F.hardtanh_: two_slopes(_hardtanh, "min_val", "max_val", inplace=True),
        F.hardsigmoid: two_slopes(lambda: (-3.0, 3.0, 0.0, 1 / 6), "inplace"),
        F.leaky_relu: two_slopes(_leaky_relu, "negative_slope", "inplace"),
        F.leaky_relu_: two_slopes(_leaky_relu, "negative_slope", inplace=True),
    },
}
