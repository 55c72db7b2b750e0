"""Stores frozen weights in bf16, int8 or NF4, and dequantizes them for one layer's forward or backward at a time.

    int8  codes from -127 to 127, a bfloat16 scale for up to 64 elements of a row: 8.25 bits an element
    nf4   the 16 normal-float levels of QLoRA (arXiv 2305.14314, appendix E), packed, and such scales: 4.25 bits

A Linear or Conv2d becomes a subclass that dequantizes its weight in forward and once more in backward. Autograd keeps
the codes, which are there anyway. A tensor subclass would also serve parents that read `qkv.weight` (attention of BEiT,
EVA, Swin-v2), but state_dict, fake tensors and autocast would no longer see plain tensors: those weights stay as they
are. bitsandbytes (0.50) is not used: it refuses float64, and its int8 has 1.6 times the error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.ops.linear_conv import bias_gradient, input_gradient
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.codebooks import GROUP_BINS, Codebook
from s2a_cli.activations.quant.primitives import SCALE, dequantize_groupwise, quantize_groupwise
from s2a_cli.activations.quant.primitives import dequantize_int8 as dequantize_int8_codes
from s2a_cli.backbones.stored import Stored, computing_dtype

GROUP = 64  # most elements of a row that share a scale
INT8_MAX = 127  # largest code of int8; -128 is not used


def group_size(width: int) -> int:
    """Returns the largest divisor of a row's width up to GROUP, so that all groups have the same size."""
    return next(size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


def normal_float_entries() -> Tensor:
    """Returns the levels of NF4, float64 [16], from -1 to 1: normal quantiles, eight above an exact 0, seven below."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # halfway between the outermost of 15 and of 16 equal shares
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([below, above.new_zeros(1), above.flip(0)])
    return found / found[-1]


def normal_float_codebook() -> Codebook:
    """Returns the codebook of NF4."""
    found, edges = normal_float_entries(), torch.linspace(-1, 1, GROUP_BINS + 1, dtype=torch.float64)
    return Codebook(4, -1.0, 1.0, codebooks.nearest((edges[1:] + edges[:-1]) / 2, found), found.float())


# quantize(rows [out, width]) -> codes, scales; dequantize(codes, scales, width, dtype) -> [out, width], with one
# temporary. All stored tensors are integers (the bits of scales, of bf16), so that Module.to(dtype) leaves them alone.


def quantize_bf16(rows: Tensor) -> tuple[Tensor, ...]:
    return (rows.to(torch.bfloat16).view(torch.int16),)


def dequantize_bf16(codes: Tensor, scales: None, width: int, dtype: torch.dtype) -> Tensor:
    return codes.view(torch.bfloat16).to(dtype)


def quantize_int8(rows: Tensor) -> tuple[Tensor, ...]:
    grouped = rows.float().unflatten(1, (-1, group_size(rows.shape[1])))
    scales = (grouped.abs().amax(-1) / INT8_MAX).clamp_min_(torch.finfo(SCALE).tiny).to(SCALE)
    codes = (grouped / scales[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes.flatten(1), scales.view(torch.int16)


def dequantize_int8(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return dequantize_int8_codes(codes, scales.view(SCALE), dtype)


def quantize_nf4(rows: Tensor) -> tuple[Tensor, ...]:
    codebook = codebooks.placed(normal_float_codebook, (), rows)
    codes, scales = quantize_groupwise(rows, codebook.bin_codes, codebook.low, group_size(rows.shape[1]), codebook.bits)
    return codes, scales.view(torch.int16)


def dequantize_nf4(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    codebook, count = codebooks.placed(normal_float_codebook, (), codes), len(scales)
    group = width // scales.shape[1]
    return dequantize_groupwise(
        codes, scales.view(SCALE), codebook.entries, width, group, codebook.bits, 0, count, dtype
    )


CODECS = {
    "bf16": (quantize_bf16, dequantize_bf16),
    "int8": (quantize_int8, dequantize_int8),
    "nf4": (quantize_nf4, dequantize_nf4),
}


class Quantized(Stored):
    """A layer with codes in place of its weight, whose rows [out, ...] are quantized in groups."""

    FORM = ("codes", "scales")
    kind: str  # of the format, a key of CODECS
    codes: Tensor
    scales: Tensor | None

    def take(self, weight: Tensor) -> None:
        super().take(weight)
        quantize, self.dequantize = CODECS[self.kind]
        codes, *scales = quantize(weight.flatten(1))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales[0] if scales else None)

    def dequantized(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns the weight that codes and scales of this layer stand for."""
        return self.dequantize(codes, scales, math.prod(self.shape[1:]), dtype).view(self.shape)

    @property
    def weight(self) -> Tensor:
        """Returns the weight, dequantized at each call."""
        return self.dequantized(self.codes, self.scales, self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Apply.apply(x, self.bias, self.codes, self.scales, self)

    def input_gradient(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Returns the gradient of an input of this size for the gradient of the output."""
        if isinstance(self, nn.Conv2d):
            return input_gradient(grad, weight, size[2:], self.stride, self.padding, self.dilation, self.groups)
        return grad.matmul(weight)


class QuantizedLinear(Quantized, nn.Linear):
    """A Linear with codes in place of its weight [out, in]."""


class QuantizedConv2d(Quantized, nn.Conv2d):
    """A Conv2d with codes in place of its weight [out, in / groups, H, W]."""


class Apply(torch.autograd.Function):
    """Computes layer.run(x, the dequantized weight, bias) in the dtype in which PyTorch computes the plain layer."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor | None, layer: Quantized):
        dtype = computing_dtype(x)
        ctx.layer, ctx.size, ctx.dtype = layer, x.shape, x.dtype
        ctx.save_for_backward(codes, scales)
        out = layer.run(x.to(dtype), layer.dequantized(codes, scales, dtype), None if bias is None else bias.to(dtype))
        return out.detach()  # a view of a custom function's output could not be changed in place

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        layer, dx, dbias = ctx.layer, None, None
        if ctx.needs_input_grad[0]:
            weight = layer.dequantized(*ctx.saved_tensors, grad.dtype)
            dx = layer.input_gradient(grad, weight, ctx.size).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            linear = len(layer.shape) == 2
            dbias = bias_gradient(grad) if linear else grad.sum((0, *range(2, grad.dim())))
        return dx, dbias, None, None, None
