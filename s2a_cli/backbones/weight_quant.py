"""How frozen weights are stored: in bf16, int8 or NF4, unpacked for one layer's forward or backward at a time.

    int8  codes from -127 to 127, a bfloat16 scale for up to 64 elements of a row: 8.25 bits an element
    nf4   the 16 normal-float levels of QLoRA (arXiv 2305.14314, appendix E), packed, scales likewise: 4.25 bits

A Linear or Conv2d becomes a subclass whose forward decodes, and decodes again in backward; autograd keeps the codes,
which are there anyway. A tensor subclass would also serve parents that read `qkv.weight` (attention of BEiT, EVA,
Swin-v2), but state_dict, fake tensors and autocast would no longer see plain tensors: those weights stay as they are.

Codecs of a library would not do: bitsandbytes' (0.50) refuse float64, and its int8 has 1.6 times the error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.ops.linear_conv import input_gradient
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.codebooks import GROUP_BINS, Codebook
from s2a_cli.activations.quant.primitives import SCALE, dequantize_groupwise, dequantize_int8, quantize_groupwise
from s2a_cli.common.errors import UserError

if TYPE_CHECKING:
    from s2a_cli.backbones.backbone import Backbone

GROUP = 64  # most elements of a row that share a scale
LARGEST = 127  # code of int8


def group_size(width: int) -> int:
    """The largest divisor of a row's width up to GROUP: no group is short."""
    return next(size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


def normal_float_entries() -> Tensor:
    """float64 [16], ascending from -1 to 1: quantiles of a normal variable, eight above an exact 0, seven below."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # halfway between the outermost of 15 and of 16 equal shares
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([below, above.new_zeros(1), above.flip(0)])
    return found / found[-1]


def normal_float_codebook() -> Codebook:
    found, edges = normal_float_entries(), torch.linspace(-1, 1, GROUP_BINS + 1, dtype=torch.float64)
    return Codebook(4, -1.0, 1.0, codebooks.nearest((edges[1:] + edges[:-1]) / 2, found), found.float())


# encode(rows [out, width]) -> codes, scales; decode(codes, scales, width, dtype) -> [out, width] in one temporary. All
# stored tensors are of integers, scales and bf16 by their bits, so that Module.to(dtype) leaves them alone.


def encode_bf16(rows: Tensor) -> tuple[Tensor, ...]:
    return (rows.to(torch.bfloat16).view(torch.int16),)


def decode_bf16(codes: Tensor, scales: None, width: int, dtype: torch.dtype) -> Tensor:
    return codes.view(torch.bfloat16).to(dtype)


def encode_int8(rows: Tensor) -> tuple[Tensor, ...]:
    grouped = rows.float().unflatten(1, (-1, group_size(rows.shape[1])))
    scales = (grouped.abs().amax(-1) / LARGEST).clamp_min_(torch.finfo(SCALE).tiny).to(SCALE)
    codes = (grouped / scales[..., None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes.flatten(1), scales.view(torch.int16)


def decode_int8(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return dequantize_int8(codes, scales.view(SCALE), dtype)


def encode_nf4(rows: Tensor) -> tuple[Tensor, ...]:
    codebook = codebooks.placed(normal_float_codebook, (), rows)
    codes, scales = quantize_groupwise(rows, codebook.bin_codes, codebook.low, group_size(rows.shape[1]), codebook.bits)
    return codes, scales.view(torch.int16)


def decode_nf4(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    codebook, count = codebooks.placed(normal_float_codebook, (), codes), len(scales)
    group = width // scales.shape[1]
    return dequantize_groupwise(
        codes, scales.view(SCALE), codebook.entries, width, group, codebook.bits, 0, count, dtype
    )


CODECS = {"bf16": (encode_bf16, decode_bf16), "int8": (encode_int8, decode_int8), "nf4": (encode_nf4, decode_nf4)}


class Stored(nn.Module):
    """What StoredLinear and StoredConv2d share: codes in place of a weight."""

    stores_weights = True  # in its buffers

    def store(self, kind: str, weight: Tensor) -> None:
        encode, self.decode = CODECS[kind]
        self.shape = weight.shape
        codes, *scales = encode(weight.detach().flatten(1))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales[0] if scales else None)
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # Module.to(dtype) converts it

    def unpacked(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.decode(codes, scales, math.prod(self.shape[1:]), dtype).view(self.shape)

    @property
    def elements(self) -> int:
        """Elements of the weight, which is no parameter any more."""
        return self.shape.numel()

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype or device; made anew at each call."""
        return self.unpacked(self.codes, self.scales, self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Apply.apply(x, self.bias, self.codes, self.scales, self)


class StoredLinear(Stored, nn.Linear):
    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        return grad.matmul(weight)


class StoredConv2d(Stored, nn.Conv2d):
    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        return input_gradient(grad, weight, size[2:], self.stride, self.padding, self.dilation, self.groups)


class Apply(torch.autograd.Function):
    """layer.run(x, the decoded weight, bias), in the dtype that stock PyTorch would compute it in."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor | None, layer: Stored):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.size, ctx.dtype = layer, x.shape, x.dtype
        ctx.save_for_backward(codes, scales)
        out = layer.run(x.to(dtype), layer.unpacked(codes, scales, dtype), None if bias is None else bias.to(dtype))
        return out.detach()  # no view, which could not be changed in place

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        layer, dx, dbias = ctx.layer, None, None
        if ctx.needs_input_grad[0]:
            weight = layer.unpacked(*ctx.saved_tensors, grad.dtype)
            dx = layer.input_gradient(grad, weight, ctx.size).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum_to_size(layer.shape[0], *[1] * (len(layer.shape) - 2)).flatten()
        return dx, dbias, None, None, None


def store(backbone: Backbone, kind: str) -> None:
    """Replaces the storage of the frozen weights of a backbone to which a method is attached; `fp32` leaves them.

    Taken are Linear and Conv2d layers whose forward is called, outside the head and what the method added. Biases stay
    parameters. Raises UserError where there is none.
    """
    if kind == "fp32":
        return
    stored = False
    for name, module in backbone.adapted_modules("all"):
        if type(module) not in LAYERS or module.weight.requires_grad or not backbone.runs(name):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        weight = module.weight
        del module.weight
        module.__class__ = LAYERS[type(module)]
        module.store(kind, weight)
        stored = True
    if not stored:
        raise UserError(
            f"backbone.weights={kind}: this method freezes no weight of a Linear or Conv2d of the backbone; use fp32"
        )


LAYERS = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}
