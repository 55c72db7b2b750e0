"""Max pooling keeps, for each output, which place of its window was the largest; average pooling and padding nothing.

All are exact. Bytes kept by max pooling of n outputs: packed_size(n, ceil(log2(kh * kw))), 4 bits for windows of 3 x 3
(PyTorch keeps the input and an int64 index an output). Falls back to PyTorch for return_indices, windows of more than
256 places, and inputs without a batch dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.chunk_sizes import chunk_sizes
from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant.packing import pack_into, packed_size, unpack
from s2a_cli.activations.quant.primitives import operator

_pool_with_indices = torch.ops.aten.max_pool2d_with_indices


def _pair(value) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value


def window_bits(kernel: list[int]) -> int:
    return max(1, math.ceil(math.log2(math.prod(kernel))))


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    return (
        out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out
    )  # no window starts in the right padding


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _samples(x: Tensor, each: int) -> list[tuple[int, int]]:
    """Returns ranges of samples with about chunk_sizes.temporary outputs, `each` a sample.

    All begin at a multiple of 8 outputs, so that their codes begin a byte.
    """
    step = max(1, chunk_sizes(x.device).temporary // each)
    step = step if each % 8 == 0 else -(-step // 8) * 8
    return [(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _corners(size: torch.Size, stride: list[int], padding: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the input row [height, 1] and column [width] of the first place of each output's window.

    size: (height, width) of the outputs. Rows and columns may be negative.
    """
    height, width = size
    row = torch.arange(height, device=device, dtype=torch.int32)[:, None] * stride[0] - padding[0]
    return row, torch.arange(width, device=device, dtype=torch.int32) * stride[1] - padding[1]


def output_like(x: Tensor, kernel, stride, padding, dilation, ceil_mode) -> Tensor:
    """Returns a tensor for what pooling returns."""
    sides = [_output_size(*a, ceil_mode) for a in zip(x.shape[2:], kernel, stride, padding, dilation)]
    return x.new_empty((*x.shape[:2], *sides)).to(memory_format=_format(x))


def _fake_pool(x, kernel, stride, padding, dilation, ceil_mode):
    out = output_like(x, kernel, stride, padding, dilation, ceil_mode)
    return out, x.new_empty(packed_size(out.numel(), window_bits(kernel)), dtype=torch.uint8)


@operator(
    "max_pool2d(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) "
    "-> (Tensor, Tensor)",
    _fake_pool,
    family="pooling",
)
def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode):
    """Returns what PyTorch's pooling returns, and the packed index of each output in its window, in logical order."""
    out, packed = _fake_pool(x, kernel, stride, padding, dilation, ceil_mode)
    row, column = _corners(out.shape[2:], stride, padding, x.device)
    for start, stop in _samples(x, out[0].numel()) if out.numel() else ():
        out[start:stop], index = _pool_with_indices(x[start:stop], kernel, stride, padding, dilation, ceil_mode)
        index = index.to(torch.int32)
        down = (index // x.shape[3] - row) // dilation[0]
        code = down * kernel[1] + (index % x.shape[3] - column) // dilation[1]
        code = code.contiguous().view(-1).to(torch.uint8)
        pack_into(packed, start * out[0].numel(), code, window_bits(kernel), out.numel())
    return out, packed


def _fake_pool_backward(grad, packed, size, kernel, stride, padding, dilation, ceil_mode):
    return grad.new_empty(size).to(memory_format=_format(grad))


@operator(
    "max_pool2d_backward(Tensor grad, Tensor packed, SymInt[] size, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> Tensor",
    _fake_pool_backward,
    family="pooling",
)
def max_pool2d_backward(grad, packed, size, kernel, stride, padding, dilation, ceil_mode):
    dx = _fake_pool_backward(grad, packed, size, kernel, stride, padding, dilation, ceil_mode)
    row, column = _corners(grad.shape[2:], stride, padding, grad.device)
    each, bits = math.prod(grad.shape[1:]), window_bits(kernel)
    for start, stop in _samples(grad, each) if grad.numel() else ():
        code = (
            unpack(packed, start * each, stop * each, bits, grad.numel())
            .to(torch.int32)
            .view(stop - start, *grad.shape[1:])
        )
        index = (row + code // kernel[1] * dilation[0]) * size[3] + column + code % kernel[1] * dilation[1]
        span = dx[start:stop]
        arguments = kernel, stride, padding, dilation, ceil_mode, index.long()
        span.copy_(
            torch.ops.aten.max_pool2d_with_indices_backward(grad[start:stop], torch.empty_like(span), *arguments)
        )
    return dx


class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *geometry):
        out, packed = max_pool2d(x, *geometry)
        ctx.size, ctx.geometry = x.shape, geometry
        ctx.save_for_backward(packed)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        return max_pool2d_backward(grad, *ctx.saved_tensors, ctx.size, *ctx.geometry), *(None,) * len(ctx.geometry)


class ByShape(torch.autograd.Function):
    """Computes y = run(x), linear in x.

    The gradient depends on the shape of x alone, and is taken at a stand-in for it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, run):
        ctx.size, ctx.run = x.shape, run
        return run(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        stand_in = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=_format(grad))
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            stand_in.requires_grad_()
            return torch.autograd.grad(ctx.run(stand_in), stand_in, grad)[0], None


class AveragePool(torch.autograd.Function):
    """Computes y = run(x); the gradient of a mean depends on the shape of x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, run, geometry: tuple):
        ctx.size, ctx.geometry = x.shape, geometry
        return run(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        stand_in = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=_format(grad))
        return torch.ops.aten.avg_pool2d_backward(grad, stand_in, *ctx.geometry), None, None


@handles(F.max_pool2d, torch.max_pool2d, bits=None)
def max_pool(op, stock, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    kernel = _pair(kernel_size)
    if not covers(input) or return_indices or input.dim() != 4 or math.prod(kernel) > 256:
        return NotImplemented
    return MaxPool.apply(input, kernel, _pair(stride or kernel), _pair(padding), _pair(dilation), ceil_mode)


@handles(F.avg_pool2d, bits=None)
def average_pool(
    op,
    stock,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    if not covers(input) or input.dim() != 4:
        return NotImplemented

    def run(x: Tensor) -> Tensor:
        return stock(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    geometry = (
        _pair(kernel_size),
        _pair(stride or kernel_size),
        _pair(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return AveragePool.apply(input, run, geometry)


@handles(F.adaptive_avg_pool2d, bits=None)
def adaptive_average_pool(op, stock, input, output_size):
    if not covers(input) or input.dim() != 4 or input.numel() == 0:
        return NotImplemented
    return ByShape.apply(input, lambda x: stock(x, output_size))


@handles(F.pad, bits=None)
def pad(op, stock, input, pad, mode="constant", value=None):
    if not covers(input) or mode not in ("reflect", "replicate") or input.dim() != 4 or input.numel() == 0:
        return NotImplemented
    return ByShape.apply(input, lambda x: stock(x, pad, mode))
