"""How frozen weights are stored: bf16, or codes with a scale a group, unpacked for one layer's forward or backward at a time.

    int8  8-bit integers, uniform between minus and plus the largest element of 64 in a row
    nf4   the 16 normal-float levels of QLoRA (arXiv 2305.14314, appendix E), likewise in groups of 64

Stored are the weights of frozen Linear and Conv layers whose own forward is called; where a parent reads a layer's weight
(attention of BEiT and EVA, which concatenates biases) it stays as it is. Autograd keeps the codes, which are there anyway.
Codes, operators and packing are those of activations: they run on every device, under fake tensors, and need no package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.activations import levels
from s2a_cli.activations.autograd import first_order
from s2a_cli.activations.conv import input_gradient
from s2a_cli.activations.levels import GROUP_BINS, Table
from s2a_cli.activations.operators import SCALE, decode_groups, encode_groups
from s2a_cli.backbones import Backbone
from s2a_cli.errors import UserError

GROUP = 64  # elements of a row that share a scale: 0.25 bits an element
BITS = {"int8": 8, "nf4": 4}
OFFSET = 0.9677083  # QLoRA's: the outermost quantile, between those of 15 and of 16 equal shares


def integer_levels() -> Tensor:
    """float64 [256]: -127/127, ..., 127/127, the last one twice."""
    return torch.arange(-127, 129, dtype=torch.float64).div_(127).clamp_(max=1)


def normal_float_levels() -> Tensor:
    """float64 [16], ascending from -1 to 1 with an exact 0: eight quantiles of a normal variable above 0, seven below."""
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return found / found[-1]


def weight_table(kind: str) -> Table:
    found = integer_levels() if kind == "int8" else normal_float_levels()
    edges = torch.linspace(-1, 1, GROUP_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize((edges[1:] + edges[:-1]) / 2, (found[1:] + found[:-1]) / 2).to(torch.uint8)
    return Table(BITS[kind], -1.0, 1.0, bins, found.float())


class Stored:
    """What StoredLinear and StoredConv share: a weight as codes in place of a parameter."""

    kind: str
    shape: torch.Size

    def store(self, kind: str) -> None:
        weight = self.weight.detach()
        self.kind, self.shape = kind, weight.shape
        if kind == "bf16":
            self.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
            return
        rows = weight.flatten(1)
        table = levels.placed(weight_table, (kind,), rows)
        codes, scales = encode_groups(rows, table.bins, table.low, GROUP, table.bits)
        del self.weight
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(torch.int16))  # as integers: Module.to(dtype) leaves them alone

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.kind == "bf16" else (self.codes, self.scales)

    def decode(self, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """The weight, for as long as the caller holds it."""
        if self.kind == "bf16":
            return stored[0].to(dtype)
        codes, scales = stored
        table = levels.placed(weight_table, (self.kind,), codes)
        width = math.prod(self.shape[1:])
        scales = scales.view(SCALE)
        rows = decode_groups(codes, scales, table.levels, width, GROUP, table.bits, 0, len(scales), dtype)
        return rows.view(self.shape)

    def apply_stored(self, x: Tensor, run: Callable, back: Callable) -> Tensor:
        return Apply.apply(x, self.bias, self, run, back, *self.tensors())


class Apply(torch.autograd.Function):
    """run(x, weight, bias) with a stored weight; dx = back(grad, weight, x's shape)."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: Stored, run: Callable, back: Callable, *stored: Tensor):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.back, ctx.shape, ctx.dtype = layer, back, x.shape, x.dtype
        ctx.save_for_backward(*stored)
        return run(x.to(dtype), layer.decode(dtype, *stored), None if bias is None else bias.to(dtype))

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = ctx.back(grad, ctx.layer.decode(grad.dtype, *ctx.saved_tensors), ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            channels = -1 if isinstance(ctx.layer, nn.Linear) else 1
            dbias = grad.sum([d for d in range(grad.dim()) if d != channels % grad.dim()])
        return dx, dbias, *(None,) * (len(ctx.needs_input_grad) - 2)


class StoredLinear(Stored, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.apply_stored(x, F.linear, lambda grad, weight, shape: grad.matmul(weight))


class StoredConv(Stored, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return self.apply_stored(
            x,
            lambda x, weight, bias: F.conv2d(x, weight, bias, *geometry),
            lambda grad, weight, shape: input_gradient(grad, weight, shape[2:], *geometry),
        )


def store(backbone: Backbone, kind: str) -> None:
    """Stores the frozen weights of a backbone to which a method is attached; `fp32` leaves them.

    Call it last, on a model of the dtype and on the device that it has in the end or on the CPU. Raises UserError where no
    weight is frozen.
    """
    if kind == "fp32":
        return
    found = 0
    for name, module in backbone.adapted_modules("all"):
        stored = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv}.get(type(module))
        if not stored or module.weight.requires_grad or not backbone.runs(name):
            continue
        if stored is StoredConv and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        found += 1
        elements = module.weight.numel()
        module.__class__ = stored
        module.store(kind)
        if kind != "bf16":
            backbone.stored += elements
    if not found:
        raise UserError(f"backbone.weights={kind}: this method trains every weight, so none can be stored in fewer bits; use fp32")
