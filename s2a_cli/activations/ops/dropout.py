"""Dropout keeps its mask in one bit an element; forward and gradient are PyTorch's, from the same random numbers.

Falls back to PyTorch for in-place dropout, p of 0 or 1, and dropout of whole channels (its noise is small).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.packing import inverse, memory_order
from s2a_cli.activations.quant.primitives import multiply_dequantized, pack_interval


class Dropout(torch.autograd.Function):
    """Computes y = dropout(x, p) and keeps the mask of the noise; dx = grad * noise."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float):
        if x.is_cuda:  # both ways are what F.dropout does there
            out, noise = torch.native_dropout(x, p, True)
        else:
            noise = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
            out = x * noise
        ctx.order, ctx.codebook = memory_order(noise), codebooks.mask(p, x)
        ctx.save_for_backward(pack_interval(noise.permute(ctx.order), 0.0, math.inf))
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (packed,) = ctx.saved_tensors
        return multiply_dequantized(grad.permute(ctx.order), packed, ctx.codebook.entries, 1).permute(
            inverse(ctx.order)
        ), None


@handles(F.dropout, bits=None)
def dropout(op, stock, input, p=0.5, training=True, inplace=False):
    if not covers(input) or not training or inplace or not 0 < p < 1:
        return NotImplemented
    return Dropout.apply(input, p)
