"""Reductions: a norm keeps codes of its input, a maximum one bit an element; and F.normalize.

- vector_norm with ord=2 (Tensor.norm, torch.norm): codes of x, and the norms as they are: dx = g x / |x|.
- normalize with p=2: codes of the result and a factor a row, as RMSNorm keeps them: dx = (g - y (y . g)) / |x|.
- amax and amin: which elements are the largest or least, exact; where there are several they share the gradient, as in
  PyTorch.

Bytes kept for n elements in rows of D: groupwise_size of them; normalize also 4 a row; amax packed_size(n, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.chunk_sizes import chunk_sizes
from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.norm import norm_backward, quantize_normalized
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.groupwise import decoded_chunks, keep_quantized
from s2a_cli.activations.quant.packing import pack_into, packed_size
from s2a_cli.activations.quant.primitives import multiply_dequantized, operator

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext

Dims = tuple[int, ...]


class Length(torch.autograd.Function):
    """Computes run(x), the 2-norm of x over some dimensions, and keeps codes of x."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, dims: Dims, keepdim: bool, op: OpContext):
        out = run(x)
        ctx.layout, *kept = keep_quantized(x, op.bits("norm"), op.config.group, True, op.calibration.seed())
        ctx.dims = () if keepdim else dims
        ctx.save_for_backward(out, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        out, *kept = ctx.saved_tensors
        factor = torch.where(out > 0, grad / out, 0.0)
        for dim in sorted(ctx.dims):
            factor = factor.unsqueeze(dim)
        dx = grad.new_empty(ctx.layout.shape)
        for chunk in decoded_chunks(dx):
            x = ctx.layout.dequantize(*kept, grad.dtype, chunk.start, chunk.stop)
            torch.mul(x, factor[chunk] if len(factor) > 1 else factor, out=dx[chunk])
        return dx, None, None, None, None


def _dims(x: Tensor, dim: int | tuple[int, ...] | None) -> Dims:
    """Returns the dimensions that `dim` names, from 0; None names all."""
    listed = range(x.dim()) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    return tuple(d % x.dim() for d in listed)


def _length(op: OpContext, x: Tensor, order: object, dim, keepdim: bool, run: Callable) -> Tensor:
    euclidean = order is None or order == "fro" or order == 2
    if not covers(x) or not euclidean or x.dim() < 2 or x.numel() == 0:
        return NotImplemented
    return Length.apply(x, run, _dims(x, dim), keepdim, op)


@handles(torch.norm, Tensor.norm, bits="norm")
def norm(op, stock, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if out is not None or dtype is not None:
        return NotImplemented
    return _length(op, input, p, dim, keepdim, lambda x: stock(x, p, dim, keepdim))


@handles(torch.linalg.vector_norm, bits="norm")
def vector_norm(op, stock, x, ord=2, dim=None, keepdim=False):
    return _length(op, x, ord, dim, keepdim, lambda x: stock(x, ord, dim, keepdim))


class Direction(torch.autograd.Function):
    """Computes run(x): x divided by its 2-norm over one dimension, of which it keeps codes."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, dim: int, eps: float, op: OpContext):
        laid, bits, group_size, seed = x.movedim(dim, -1), op.bits("norm"), op.config.group, op.calibration.seed()
        width = laid.shape[-1]
        codebook = codebooks.signed(bits, min(group_size, width), x, seed is not None)
        smallest = max(eps * eps / width, torch.finfo(torch.float32).tiny)  # the mean square that eps stands for
        kept = quantize_normalized(
            laid, width, smallest, False, codebook.bin_codes, group_size, bits, codebook.chances, seed or 0
        )
        ctx.entries, ctx.layout, ctx.dim = codebook.entries, (width, group_size, bits), dim
        ctx.save_for_backward(*kept)
        return run(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        width, group_size, bits = ctx.layout
        g = grad.movedim(ctx.dim, -1)
        dx, _, _ = norm_backward(g, *ctx.saved_tensors, ctx.entries, None, width, width, width, False, group_size, bits)
        return dx.mul_(width**-0.5).movedim(-1, ctx.dim), None, None, None, None


@handles(F.normalize, bits="norm")
def normalize(op, stock, input, p=2.0, dim=1, eps=1e-12, out=None):
    if (
        not covers(input)
        or p != 2
        or not isinstance(dim, int)
        or out is not None
        or input.dim() < 2
        or input.numel() == 0
    ):
        return NotImplemented
    return Direction.apply(input, lambda x: stock(x, p, dim, eps), dim % input.dim(), eps, op)


def _fake_pack_equal(x, y):
    return x.new_empty(packed_size(x.numel(), 1), dtype=torch.uint8)


@operator("pack_equal(Tensor x, Tensor y) -> Tensor", _fake_pack_equal, family="codes")
def pack_equal(x: Tensor, y: Tensor) -> Tensor:
    """Returns 1 bit an element, in logical order: x == y, where y [B or 1, ...] broadcasts to x [B, ...]."""
    packed, each = _fake_pack_equal(x, y), x[0].numel()
    y = y.expand(len(x), *y.shape[1:])
    step = -(-max(1, chunk_sizes(x.device).temporary // max(each, 1)) // 8) * 8  # so that a span begins a byte
    for start in range(0, len(x), step):
        equal = (x[start : start + step] == y[start : start + step]).contiguous().view(-1)
        pack_into(packed, start * each, equal, 1, x.numel())
    return packed


class Extreme(torch.autograd.Function):
    """Computes run(x): the largest, or the least, of x over some dimensions."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, dims: Dims, keepdim: bool):
        out = run(x)
        ctx.dims, ctx.keepdim, ctx.size = dims, keepdim, x.shape
        ctx.save_for_backward(pack_equal(x, _restored(out, dims, keepdim)))
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (packed,) = ctx.saved_tensors
        one = grad.new_ones(()).expand(ctx.size)
        chosen = multiply_dequantized(one, packed, codebooks.slopes(0.0, 1.0, grad).entries, 1)
        share = _restored(grad, ctx.dims, ctx.keepdim) / chosen.sum(ctx.dims, keepdim=True)
        return chosen.mul_(share), None, None, None


def _restored(x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    """Returns a reduced tensor with the dimensions that it was reduced over."""
    for dim in () if keepdim else sorted(dims):
        x = x.unsqueeze(dim)
    return x


@handles(torch.amax, Tensor.amax, torch.amin, Tensor.amin, bits=None)
def extreme(op, stock, input, dim=(), keepdim=False):
    if not covers(input) or input.dim() < 2 or input.numel() == 0:
        return NotImplemented
    return Extreme.apply(input, lambda x: stock(x, dim, keepdim), _dims(input, dim), keepdim)
