"""Matmul, and elementwise operators of two activations, keep codes of both, as attention does of q, k and v.

- matmul and bmm of equal batches (unfused attention). A factor that is a quantized softmax's map shares its codes.
- mul of an activation with a gate a sample (squeeze and excitation, gated MLPs). A broadcast gate is small: kept.
- div by an activation (normalised attention maps): codes of the quotient, and the divisor as it is; in place, too.
- powers with an integer exponent of at least 2 (hand-written norms, squared ReLU): codes of the base.

All use the `attention` bits. Falls back to PyTorch where a factor is a parameter, or only one needs a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2a_cli.activations.ops.attention import quantized_softmax
from s2a_cli.activations.ops.autograd import alone, covers, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant.groupwise import GroupwiseLayout, decoded_chunks, keep_quantized

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


class MatMul(torch.autograd.Function):
    """Computes run(a, b) of a [B, ..., M, K] and b [B, ..., K, N], and keeps codes of both."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, run: Callable, op: OpContext):
        (ctx.left, *left), (ctx.right, *right) = _keep_matrix(a, op), _keep_matrix(b, op)
        ctx.save_for_backward(*left, *right)
        return run(a, b)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        left, right = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        da, db = grad.new_empty(ctx.left.shape), grad.new_empty(ctx.right.shape)
        for chunk in decoded_chunks(grad, max(math.prod(t.shape[1:]) for t in (da, db, grad))):
            torch.matmul(
                grad[chunk], ctx.right.dequantize(*right, grad.dtype, chunk.start, chunk.stop).mT, out=da[chunk]
            )
            torch.matmul(ctx.left.dequantize(*left, grad.dtype, chunk.start, chunk.stop).mT, grad[chunk], out=db[chunk])
        return da, db, None, None


def _keep(x: Tensor, op: OpContext, flat: bool = False) -> tuple[GroupwiseLayout, Tensor, Tensor]:
    return keep_quantized(x, op.bits("attention"), op.config.group, flat, op.calibration.seed())


def _keep_matrix(x: Tensor, op: OpContext) -> tuple[GroupwiseLayout, Tensor, Tensor]:
    return quantized_softmax(x) or _keep(x, op)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, bits="attention")
def matmul(op, stock, input, other):
    if not (covers(input) and covers(other)) or input.dim() < 3 or input.shape[:-2] != other.shape[:-2]:
        return NotImplemented
    return MatMul.apply(input, other, stock, op)


@handles(torch.bmm, Tensor.bmm, bits="attention")
def bmm(op, stock, input, mat2):
    return matmul(op, stock, input, mat2)


class Gate(torch.autograd.Function):
    """Computes run(x, gate) = x * gate, where gate broadcasts to x.

    A gate of x's shape is quantized, a smaller one kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, run: Callable, op: OpContext):
        ctx.x, *kept = _keep(x, op, flat=True)
        if gate.shape == x.shape:
            ctx.gate, *gate_kept = _keep(gate, op, flat=True)
        else:
            ctx.gate, gate_kept = None, [alone(gate)]
        ctx.size = gate.shape
        ctx.save_for_backward(*kept, *gate_kept)
        return run(x, gate)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        kept, gate_kept = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        dx, dgate = torch.empty_like(grad), grad.new_empty(ctx.size)
        for chunk in decoded_chunks(grad):
            g, span = grad[chunk], (chunk.start, chunk.stop)
            gate = ctx.gate.dequantize(*gate_kept, grad.dtype, *span) if ctx.gate else gate_kept[0][chunk]
            torch.mul(g, gate, out=dx[chunk])
            dgate[chunk] = (g * ctx.x.dequantize(*kept, grad.dtype, *span)).sum_to_size(dgate[chunk].shape)
        return dx, dgate, None, None


@handles(torch.mul, Tensor.mul, Tensor.__mul__, bits="attention")
def multiply(op, stock, input, other):
    if input is other and covers(input) and not input.is_leaf and input.dim() > 0:
        return Power.apply(input, lambda x: stock(x, x), 2, op)
    if not (covers(input) and covers(other)) or input.is_leaf or other.is_leaf or input.dim() != other.dim():
        return NotImplemented
    x, gate = (input, other) if input.numel() >= other.numel() else (other, input)
    if x.dim() == 0 or x.shape[0] != gate.shape[0]:
        return NotImplemented
    if torch.broadcast_shapes(x.shape, gate.shape) != x.shape:  # both are small beside the product
        return stock(alone(input), alone(other))
    return Gate.apply(x, gate, stock, op)


class Divide(torch.autograd.Function):
    """Computes y = run(x, divisor), in place or not, and keeps codes of y; the divisor broadcasts to x."""

    @staticmethod
    def forward(ctx, x: Tensor, divisor: Tensor, run: Callable, inplace: bool, op: OpContext):
        y = run(x, divisor)
        ctx.y, *kept = _keep(y, op, flat=True)
        ctx.size = divisor.shape
        ctx.save_for_backward(alone(divisor), *kept)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        divisor, *kept = ctx.saved_tensors
        dx = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        total = grad.new_empty(ctx.size)
        for chunk in decoded_chunks(grad):
            quotient = grad[chunk] / divisor[chunk]
            y = ctx.y.dequantize(*kept, grad.dtype, chunk.start, chunk.stop)
            total[chunk] = (quotient * y).sum_to_size(total[chunk].shape).neg_()
            if dx is not None:
                dx[chunk] = quotient
        return dx, total, None, None, None


@handles(torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__, bits="attention")
def divide(op, stock, input, other, inplace=False):
    if not isinstance(other, Tensor) or not covers(other) or other.is_leaf or not input.is_floating_point():
        return NotImplemented
    fits = input.dim() == other.dim() > 0 and input.shape[0] == other.shape[0]
    if not fits or torch.broadcast_shapes(input.shape, other.shape) != input.shape or (inplace and input.is_leaf):
        return NotImplemented
    return Divide.apply(input, other, stock, inplace, op)


@handles(Tensor.div_, Tensor.true_divide_, Tensor.__itruediv__, bits="attention")
def divide_(op, stock, input, other):
    return divide(op, stock, input, other, inplace=True)


class Power(torch.autograd.Function):
    """Computes run(x), the power with this exponent, and keeps codes of x."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, exponent: int, op: OpContext):
        ctx.x, *kept = _keep(x, op, flat=True)
        ctx.exponent = exponent
        ctx.save_for_backward(*kept)
        return run(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        dx = torch.empty_like(grad)
        for chunk in decoded_chunks(grad):
            x = ctx.x.dequantize(*ctx.saved_tensors, grad.dtype, chunk.start, chunk.stop)
            torch.mul(x.pow_(ctx.exponent - 1).mul_(ctx.exponent), grad[chunk], out=dx[chunk])
        return dx, None, None, None


@handles(torch.pow, Tensor.pow, Tensor.__pow__, bits="attention")
def power(op, stock, input, exponent):
    whole = isinstance(exponent, int | float) and exponent >= 2 and exponent == int(exponent)
    if (
        not isinstance(input, Tensor)
        or not whole
        or not covers(input)
        or input.is_leaf
        or input.dim() == 0
        or input.numel() == 0
    ):
        return NotImplemented
    return Power.apply(input, lambda x: stock(x, exponent), int(exponent), op)


@handles(torch.square, Tensor.square, bits="attention")
def square(op, stock, input):
    if not covers(input) or input.is_leaf or input.dim() == 0 or input.numel() == 0:
        return NotImplemented
    return Power.apply(input, stock, 2, op)
