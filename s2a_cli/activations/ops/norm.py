"""Normalisation: LayerNorm, GroupNorm and RMSNorm keep codes of x^ and rstd; a frozen BatchNorm keeps nothing.

x^ is x normalised, rstd is 1 / deviation. A layer over its last dimension has a calibrated shift and factor for each
channel of x^, see quant/calibration.py. Bytes kept for R normalised rows of D elements: groupwise_size(R, D, group,
bits) + 4 R (rstd, float32). With g the gradient and g' = weight * g,

    dx = rstd (g' - mean g' - x^ mean(g' x^)),  dweight = sum g x^,  dbias = sum g        (RMSNorm: without mean g')

BatchNorm is covered in evaluation mode when its weight is frozen: it is a constant scale and a shift. Falls back to
PyTorch in training mode, or when its weight trains.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.packing import byte_table, groups_per_row, packed_size, rows
from s2a_cli.activations.quant.primitives import SCALE, dequantize_rows, draws, operator, quantize_rows, working_type
from s2a_cli.common.norms import own

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


def _fake_encode(x, width, eps, centre, bin_codes, group_size, bits, chances=None, seed=0, channels=None):
    total = x.numel() // width
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    scales = x.new_empty((total, groups_per_row(width, group_size)), dtype=SCALE)
    return packed, scales, x.new_empty(total, dtype=torch.float32)


@operator(
    "quantize_normalized(Tensor x, int width, float eps, bool centre, Tensor bin_codes, int group_size, int bits, "
    "Tensor? chances=None, int seed=0, Tensor? channels=None) -> (Tensor, Tensor, Tensor)",
    _fake_encode,
    family="normalisation",
)
def quantize_normalized(
    x: Tensor,
    width: int,
    eps: float,
    centre: bool,
    bin_codes: Tensor,
    group_size: int,
    bits: int,
    chances: Tensor | None = None,
    seed: int = 0,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes and scales of x^, each `width` elements of x normalised, and rstd, float32 [rows]."""
    packed, scales, rstd = _fake_encode(x, width, eps, centre, bin_codes, group_size, bits)
    up = draws(chances, seed)
    shift = weight = None
    if channels is not None:  # (x^ - shift) / factor, as the affine part of the norm
        weight = channels[2]
        shift = -channels[0] * weight
    for start, span in rows(x, width):
        normal, factor = normalise(span.float(), eps, centre, weight, shift)
        rstd[start : start + span.shape[0]] = factor[:, 0]
        quantize_rows(normal, packed, scales, start, rstd.numel(), bin_codes, -1.0, group_size, bits, up)
    return packed, scales, rstd


def normalise(
    rows: Tensor, eps: float, centre: bool, weight: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns x^ * weight + shift of each row [n, width], and its rstd [n, 1]; all float32."""
    if centre:
        normal, _, rstd = torch.native_layer_norm(rows, rows.shape[1:], weight, shift, eps)
        return normal, rstd
    rstd = torch.linalg.vecdot(rows, rows).div_(rows.shape[1]).add_(eps).rsqrt_()[:, None]
    normal = rows * rstd
    return (normal if weight is None or shift is None else torch.addcmul(shift, normal, weight)), rstd


def _fake_backward(
    grad, packed, scales, rstd, entries, weight, width, channels, count, centre, group_size, bits, calibrated=None
):
    return grad.new_empty(grad.shape), grad.new_empty(count), grad.new_empty(count)


@operator(
    "norm_backward(Tensor grad, Tensor packed, Tensor scales, Tensor rstd, Tensor entries, Tensor? weight, "
    "int width, int channels, int count, bool centre, int group_size, int bits, Tensor? calibrated=None) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    family="normalisation",
)
def norm_backward(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    rstd: Tensor,
    entries: Tensor,
    weight: Tensor | None,
    width: int,
    channels: int,
    count: int,
    centre: bool,
    group_size: int,
    bits: int,
    calibrated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias.

    A row has `channels` of all `count` channels, each of width / channels elements. calibrated: what
    quantize_normalized calls `channels`.
    """
    dtype = working_type(grad.dtype)
    out = grad.new_empty(grad.shape)
    dweight = grad.new_zeros(count // channels, channels, dtype=dtype)
    dbias = torch.zeros_like(dweight)
    table = byte_table(entries.to(dtype), bits)
    affine = None if weight is None else weight.to(dtype).view(-1, channels)
    for start, g in rows(grad, width):
        stop = start + g.shape[0]
        x = dequantize_rows(packed, scales, table, start, stop, width, group_size, bits, calibrated)
        g, factor = g.to(dtype), rstd[start:stop, None].to(dtype)
        if centre and channels == width == count:
            dx, dw, db = _layer_norm_backward(g, x, affine)
            dweight[0] += dw
            dbias[0] += db
        else:
            owner = torch.arange(start, stop, device=g.device) % dweight.shape[0]
            g, channelled = g.view(len(g), channels, -1), x.view(len(g), channels, -1)
            dweight.index_add_(0, owner, (g * channelled).sum(-1))
            dbias.index_add_(0, owner, g.sum(-1))
            g = (g if affine is None else g * affine[owner, :, None]).view(-1, width)
            dx = torch.addcmul(g, x, torch.linalg.vecdot(g, x)[:, None], value=-1 / width)
            if centre:
                dx -= g.mean(-1, keepdim=True)
        out.view(-1, width)[start:stop] = dx.mul_(factor)
    return out, dweight.view(-1).to(grad.dtype), dbias.view(-1).to(grad.dtype)


def _layer_norm_backward(g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Calls PyTorch's kernel, told that x^ is an input of mean 0 and deviation 1."""
    mean, rstd = g.new_zeros(len(g), 1), g.new_ones(len(g), 1)
    weight = g.new_ones(g.shape[1]) if weight is None else weight[0]
    return torch.ops.aten.native_layer_norm_backward(g, x, [g.shape[1]], mean, rstd, weight, weight, [True, True, True])


class Normalise(torch.autograd.Function):
    """Computes y = run(x, weight, bias), x normalised in rows of `width` elements, each of `channels` channels."""

    @staticmethod
    def forward(ctx, x, weight, bias, run, width: int, channels: int, eps: float, centre: bool, op: OpContext):
        ctx.shape = None if weight is None else weight.shape
        site = op.site
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            bits, group_size, seed = op.bits("norm"), op.config.group, op.calibration.seed()
            codebook = codebooks.signed(bits, group_size, x, seed is not None)
            ctx.calibrated = None
            if channels == width and x.shape[-1] == width:
                ctx.calibrated = op.calibration.channels(site, x, lambda rows: normalise(rows, eps, centre)[0])
            kept = quantize_normalized(
                x, width, eps, centre, codebook.bin_codes, group_size, bits, codebook.chances, seed or 0, ctx.calibrated
            )
            ctx.entries, ctx.layout = codebook.entries, (width, channels, centre, group_size, bits)
            ctx.save_for_backward(weight, *kept)
        else:
            over_last = channels == width and x.shape[-bias.dim() :] == bias.shape
            ctx.dims = tuple(range(x.dim() - bias.dim())) if over_last else (0, *range(2, x.dim()))
        return run(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        rest = (None,) * 6
        if not ctx.saved_tensors:
            return None, None, grad.sum(ctx.dims) if ctx.dims else grad, *rest
        weight, packed, scales, rstd = ctx.saved_tensors
        width, channels, centre, group_size, bits = ctx.layout
        count = channels if weight is None else weight.numel()
        layout = width, channels, count, centre, group_size, bits
        dx, dweight, dbias = norm_backward(grad, packed, scales, rstd, ctx.entries, weight, *layout, ctx.calibrated)
        dweight = dweight.view(ctx.shape) if ctx.needs_input_grad[1] else None
        dbias = dbias.view(ctx.shape) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, *rest


def _trains(*tensors: Tensor | None) -> bool:
    """Returns whether a gradient is to flow to any of them (grad mode is on where handlers are called)."""
    return any(t is not None and t.requires_grad for t in tensors)


@handles(F.layer_norm, bits="norm")
def layer_norm(op, stock, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    weight = own(weight)
    if not _trains(input, weight, bias) or (weight is None and bias is not None):
        return NotImplemented

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return stock(x, normalized_shape, weight, bias, eps)

    width = math.prod(normalized_shape)
    return Normalise.apply(input, weight, bias, run, width, width, eps, True, op)


@handles(F.rms_norm, bits="norm")
def rms_norm(op, stock, input, normalized_shape, weight=None, eps=None):
    if not _trains(input, weight):
        return NotImplemented

    def run(x: Tensor, weight: Tensor | None, bias: None) -> Tensor:
        return stock(x, normalized_shape, weight, eps)

    width = math.prod(normalized_shape)
    used = default_rms_eps(input.dtype) if eps is None else eps
    return Normalise.apply(input, weight, None, run, width, width, used, False, op)


@functools.cache
def default_rms_eps(dtype: torch.dtype) -> float:
    """Returns what F.rms_norm adds to the mean square by default.

    It is the eps of the dtype that it computes in, or in older PyTorch of the input's.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        x = torch.full((1, 1), math.sqrt(torch.finfo(dtype).eps), dtype=dtype)
        own, computed = torch.finfo(dtype).eps, torch.finfo(working_type(dtype)).eps
        return min(own, computed, key=lambda eps: abs(float(F.rms_norm(x, (1,))) - float(F.rms_norm(x, (1,), eps=eps))))


@handles(F.group_norm, bits="norm")
def group_norm(op, stock, input, num_groups, weight=None, bias=None, eps=1e-5):
    if not _trains(input, weight, bias) or (weight is None and bias is not None) or input.numel() == 0:
        return NotImplemented

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return stock(x, num_groups, weight, bias, eps)

    channels = input.shape[1] // num_groups
    return Normalise.apply(input, weight, bias, run, input[0].numel() // num_groups, channels, eps, True, op)


class FrozenBatchNorm(torch.autograd.Function):
    """Computes y = run(x, bias) on fixed statistics and a frozen weight; dx = grad * weight / sqrt(variance + eps)."""

    @staticmethod
    def forward(ctx, x, bias, run, variance: Tensor, weight: Tensor | None, eps: float):
        ctx.save_for_backward(variance, weight)
        ctx.eps = eps
        return run(x, bias)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        variance, weight = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            scale = (variance + ctx.eps).rsqrt_()
            scale = scale if weight is None else scale * weight
            shape = (1, -1) + (1,) * (grad.dim() - 2)
            dx = torch.mul(grad, scale.view(shape), out=torch.empty_like(grad))
        if ctx.needs_input_grad[1]:
            dbias = grad.sum((0, *range(2, grad.dim())))
        return dx, dbias, None, None, None, None


@handles(F.batch_norm, bits=None)
def batch_norm(
    op, stock, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training or running_var is None or _trains(weight) or not _trains(input, bias):
        return NotImplemented

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return stock(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return FrozenBatchNorm.apply(input, bias, run, running_var, weight, eps)
