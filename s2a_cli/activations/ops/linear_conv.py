"""Layers with weights: a frozen convolution keeps only its weight; quantized inputs of trainable layers are opt-in.

- conv1d, conv2d, conv3d, and the transposed ones, with a frozen weight: keep nothing but the reference to the weight,
  and are exact. Fall back to PyTorch for `padding="same"` that is not symmetric.
- linear, conv1d and conv2d with a weight that trains: quantize their input with `linear` bits, else are PyTorch's.
- linear with a frozen weight and a bias that trains: on CUDA the gradient of the bias takes no large buffer.
- linear: PyTorch keeps the whole storage behind a small view (the class token of a sequence): such a view is cloned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.chunk_sizes import planned_device
from s2a_cli.activations.ops.autograd import alone, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.groupwise import decoded_chunks, keep_quantized
from s2a_cli.activations.quant.packing import byte_table
from s2a_cli.activations.quant.primitives import dequantize_rows, operator, quantize_groupwise, row_ranges, working_type

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext

_CONVOLUTION = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def bias_gradient(grad: Tensor) -> Tensor:
    """Returns the sum of grad [..., out] over all but its last dimension, of samples in fp32 first.

    One sum over all rows takes PyTorch's CUDA kernel a buffer of up to 132 MiB (H200, 6,304 rows of 3,072).
    """
    if grad.dim() < 3 or planned_device(grad.device) != "cuda":
        return grad.sum(tuple(range(grad.dim() - 1)))
    return grad.sum(tuple(range(1, grad.dim() - 1)), dtype=working_type(grad.dtype)).sum(0).to(grad.dtype)


class FrozenLinear(torch.autograd.Function):
    """Computes y = run(x, weight, bias), of a weight that does not train; the bias' gradient takes no large buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, run: Callable):
        ctx.save_for_backward(weight)
        return run(x, weight, bias).detach()  # no view, which could not be changed in place

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        dx = grad.matmul(weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        return dx, None, bias_gradient(grad) if ctx.needs_input_grad[2] else None, None


class FrozenConv(torch.autograd.Function):
    """Computes y = run(x, bias), a convolution or a transposed one.

    dx is the other kind, of grad, with PyTorch's kernel.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, run: Callable, weight: Tensor, geometry: tuple, transposed: bool):
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry, ctx.transposed = x.shape[2:], geometry, transposed
        return run(x, bias)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0] and ctx.transposed:
            stride, padding, dilation, groups = ctx.geometry
            dx = _CONVOLUTION[grad.dim()](grad, weight.to(grad.dtype), None, stride, padding, dilation, groups)
        elif ctx.needs_input_grad[0]:
            dx = input_gradient(grad, weight, ctx.size, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum((0, *range(2, grad.dim())))
        return dx, dbias, None, None, None, None


def input_gradient(grad: Tensor, weight: Tensor, size, stride, padding, dilation, groups: int) -> Tensor:
    """Returns the gradient of a convolution's input, whose spatial size is `size`."""
    uncovered = [
        full - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for full, out, k, s, p, d in zip(size, grad.shape[2:], weight.shape[2:], stride, padding, dilation)
    ]
    transpose = _TRANSPOSE[grad.dim()]
    return transpose(grad, weight.to(grad.dtype), None, stride, padding, uncovered, groups, dilation)


def _geometry(weight: Tensor, stride, padding, dilation, groups: int) -> tuple | None:
    """Returns the arguments as tuples of ints; None where the padding is a name that stands for unequal sides."""
    kernel = weight.shape[2:]
    stride, dilation = _tuple(stride, len(kernel)), _tuple(dilation, len(kernel))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(t % 2 for t in total):
            return None
        padding = tuple(t // 2 for t in total)
    return stride, _tuple(padding, len(kernel)), dilation, groups


def _tuple(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count // len(value))


class CodedConv(torch.autograd.Function):
    """Computes y = run(x, weight, bias) with a weight that trains, and keeps codes of the input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, run: Callable, geometry: tuple, op: OpContext):
        ctx.layout, *kept = keep_quantized(x, op.bits("linear"), op.config.group, True, op.calibration.seed())
        ctx.geometry = geometry
        ctx.save_for_backward(weight, *kept)
        return run(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        weight, *kept = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        dx = input_gradient(grad, weight, ctx.layout.shape[2:], *ctx.geometry) if ctx.needs_input_grad[0] else None
        cast = weight.to(grad.dtype)
        dweight = torch.zeros_like(weight)
        for chunk in decoded_chunks(grad, math.prod(ctx.layout.shape[1:])):
            x = ctx.layout.dequantize(*kept, grad.dtype, chunk.start, chunk.stop)
            arguments = stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False]
            dweight += torch.ops.aten.convolution_backward(grad[chunk], x, cast, None, *arguments)[1]
        dbias = grad.sum((0, *range(2, grad.dim()))) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None


class CodedLinear(torch.autograd.Function):
    """Computes y = run(x, weight, bias) with a weight that trains, and keeps codes of the calibrated input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, run: Callable, op: OpContext):
        bits, group_size, seed = op.bits("linear"), op.config.group, op.calibration.seed()
        codebook = codebooks.signed(bits, min(group_size, x.shape[-1]), x, seed is not None)
        channels = op.calibration.channels(op.site, x)
        ctx.entries, ctx.layout, ctx.channels = codebook.entries, (x.shape[-1], group_size, bits), channels
        kept = quantize_groupwise(
            x, codebook.bin_codes, codebook.low, group_size, bits, codebook.chances, seed or 0, channels
        )
        ctx.save_for_backward(weight, *kept)
        return run(x, weight, bias).detach()  # no view, which could not be changed in place

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        weight, packed, scales = ctx.saved_tensors
        dx = grad.matmul(weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(grad, packed, scales, ctx.entries, *ctx.layout, ctx.channels)
        dbias = bias_gradient(grad) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


def _fake_weight_gradient(grad, packed, scales, entries, width, group_size, bits, channels=None):
    return grad.new_empty(grad.shape[-1], width)


@operator(
    "weight_gradient(Tensor grad, Tensor packed, Tensor scales, Tensor entries, int width, int group_size, int bits, "
    "Tensor? channels=None) -> Tensor",
    _fake_weight_gradient,
    family="linear",
)
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
    """Returns grad^T x, the gradient of a weight [out, in].

    grad: [..., out]. packed, scales: of the quantized input x [..., in].
    """
    total = grad.new_zeros(grad.shape[-1], width, dtype=working_type(grad.dtype))
    table = byte_table(entries.to(total.dtype), bits)
    flat = grad.reshape(-1, grad.shape[-1])
    for start, stop in row_ranges(0, len(flat), width, grad.device):
        x = dequantize_rows(packed, scales, table, start, stop, width, group_size, bits, channels)
        total += flat[start:stop].mT @ x.to(grad.dtype)
    return total.to(grad.dtype)


@handles(F.conv1d, F.conv2d, F.conv3d, bits=None)
def convolution(op, stock, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    geometry = _geometry(weight, stride, padding, dilation, groups)
    if geometry is None or input.dim() != weight.dim() or weight.is_complex():
        return NotImplemented

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return stock(x, weight, bias, stride, padding, dilation, groups)

    if weight.requires_grad:
        return NotImplemented if op.config.linear is None else CodedConv.apply(input, weight, bias, run, geometry, op)
    if not (input.requires_grad or (bias is not None and bias.requires_grad)):
        return NotImplemented
    return FrozenConv.apply(input, bias, lambda x, bias: run(x, weight, bias), weight, geometry, False)


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, bits=None)
def transposed_convolution(
    op, stock, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    trains = input.requires_grad or (bias is not None and bias.requires_grad)
    if weight.requires_grad or not trains or input.dim() != weight.dim() or weight.is_complex():
        return NotImplemented
    kernel = len(weight.shape[2:])
    if any(more >= s for more, s in zip(_tuple(output_padding, kernel), _tuple(stride, kernel))):
        return NotImplemented  # a convolution of the gradient would be larger than the input

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return stock(x, weight, bias, stride, padding, output_padding, groups, dilation)

    return FrozenConv.apply(input, bias, run, weight, _geometry(weight, stride, padding, dilation, groups), True)


@handles(F.linear, bits=None)
def linear(op, stock, input, weight, bias=None):
    if not weight.requires_grad:
        trains = bias is not None and bias.requires_grad and input.dim() > 2
        if not trains or planned_device(input.device) != "cuda":
            return NotImplemented
        return FrozenLinear.apply(input, weight, bias, stock)
    if op.config.linear is not None and input.dim() > 1:
        return CodedLinear.apply(input, weight, bias, stock, op)
    return stock(alone(input), weight, bias)
