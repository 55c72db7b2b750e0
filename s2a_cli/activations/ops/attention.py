"""Attention: fused attention keeps codes of q, k and v; a softmax keeps codes of its map.

- scaled_dot_product_attention: backward decodes a few samples at a time and runs the stock attention on them again.
  A float mask gets its gradient; one with a part for each sample that needs one is coded, others are kept. Not covered,
  so stock: dropout_p > 0, inputs without a batch dimension, and q, k, v of unequal batch.
- the same with `softmax` bits and no `attention` bits, as the S2A paper has it: unfused, q, k and v kept as they are
and
  the map as codes. Alone among all operators its output is not stock's to the bit, but to rounding. It runs a few
  samples at a time, so that the map never exists whole. Not covered: also a mask with a gradient, grouped queries.
- softmax over a dimension: dz = p (g - sum g p), with scales along that dimension, and p decoded so that it sums to 1.

Bytes kept: grouped_size(rows, width, group, bits) for each of q, k, v (width: of a head) and for p (width: keys).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant.grouped import Grouped, keep, slices, written
from s2a_cli.activations.quant.packing import byte_table, inverse, rows
from s2a_cli.activations.quant.primitives import decode_groups, decode_rows, encode_groups, operator, working_type

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


class Attention(torch.autograd.Function):
    """out = run(q, k, v, mask): q [B, ..., N, d], k and v [B, ..., M, d]."""

    @staticmethod
    def forward(ctx, q, k, v, mask, run, op: OpContext):
        bits, group = op.config.attention, op.config.group
        # A mask that depends on each sample is an activation like the others, as large as the map itself.
        coded = [q, k, v, mask] if ctx.needs_input_grad[3] and _is_own(mask, q) else [q, k, v]
        kept = [keep(x, bits, group, seed=op.calibration.seed()) for x in coded]
        ctx.grouped = [grouped for grouped, _, _ in kept]
        ctx.run = run
        ctx.save_for_backward(None if len(coded) > 3 else mask, *(tensor for _, *tensors in kept for tensor in tensors))
        return run(q, k, v, mask)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        mask, *kept = ctx.saved_tensors
        needs_mask = ctx.needs_input_grad[3]
        totals: list[Tensor | None] = [None] * len(ctx.grouped)
        shape = ctx.grouped[3].shape if len(ctx.grouped) > 3 else () if mask is None else mask.shape
        if needs_mask and len(totals) == 3:
            totals.append(torch.zeros_like(mask))
        head = math.prod(grad.shape[1:])
        if needs_mask:  # such a mask makes stock attention write out its map
            head = max(head, grad.shape[-2] * shape[-1] * (head // (grad.shape[-2] * grad.shape[-1])))
        for part in slices(grad, head):
            inputs = [
                g.decode(*kept[2 * i : 2 * i + 2], grad.dtype, part.start, part.stop) for i, g in enumerate(ctx.grouped)
            ]
            if len(inputs) == 3:
                inputs.append(mask[part] if mask is not None and _is_own(mask, grad) else mask)
            found = _gradients(ctx.run, inputs, ctx.needs_input_grad[:4], grad[part])
            for index, (total, piece) in enumerate(zip(totals, found)):
                if piece is None:
                    continue
                if index == 3 and not (len(shape) == grad.dim() and shape[0] > 1):
                    total.add_(piece)
                else:
                    totals[index] = written(total, piece, part, len(grad))
        return *totals[:3], totals[3] if needs_mask else None, None, None


def _is_own(mask: Tensor, like: Tensor) -> bool:
    """Whether a mask has a part for each sample."""
    return mask.dim() == like.dim() and mask.shape[0] > 1


def _gradients(run, inputs: list[Tensor | None], needed: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """Gradients of run(*inputs) for the inputs that are needed."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
        if inputs[3] is not None and inputs[3].is_floating_point():
            inputs[3] = inputs[3].to(grad.dtype)
        out = run(*inputs)
        found = iter(torch.autograd.grad(out, [x for x, need in zip(inputs, needed) if need], grad))
    return [next(found) if need else None for need in needed]


class Unfused(torch.autograd.Function):
    """softmax(q k^T scale + mask) v, with q, k and v kept as they are and the map as codes, a few samples at a time."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale: float, op: OpContext):
        ctx.scale, ctx.bits, ctx.group = scale, op.config.softmax, op.config.group
        site, kept, out = op.site, [], None
        ctx.parts = list(slices(q, math.prod(q.shape[1:-1]) * k.shape[-2]))
        for part in ctx.parts:
            scores = torch.matmul(q[part], k[part].mT).mul_(scale)
            if mask is not None:
                bias = mask[part] if mask.dim() == q.dim() and len(mask) > 1 else mask
                scores = scores.masked_fill_(~bias, -math.inf) if mask.dtype == torch.bool else scores.add_(bias)
            p = torch.softmax(scores, -1, dtype=working_type(scores.dtype))
            del scores
            table, seed = op.calibration.unit(site, p, ctx.bits), op.calibration.seed() or 0
            kept += encode_groups(p, table.bins, table.low, ctx.group, ctx.bits, table.chances, seed)
            piece = torch.matmul(p.to(v.dtype), v[part])
            out = piece.new_empty((len(q), *piece.shape[1:])) if out is None else out
            out[part] = piece
        ctx.levels = table.levels
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = (grad.new_empty(x.shape) for x in (q, k, v))
        width, dtype = k.shape[-2], grad.dtype
        for index, part in enumerate(ctx.parts):
            codes, scales = kept[2 * index : 2 * index + 2]
            g = grad[part]
            p = decode_groups(codes, scales, ctx.levels, width, ctx.group, ctx.bits, 0, len(scales), dtype)
            _sum_to_one(p)
            dv[part] = torch.matmul(p.view(*g.shape[:-1], width).mT, g)
            del p
            dp = torch.matmul(g, v[part].to(dtype).mT)
            dz = softmax_backward(dp, codes, scales, ctx.levels, ctx.group, ctx.bits).mul_(ctx.scale)
            dq[part] = torch.matmul(dz, k[part].to(dtype))
            dk[part] = torch.matmul(dz.mT, q[part].to(dtype))
        return dq, dk, dv, None, None, None


@handles(F.scaled_dot_product_attention, bits=("attention", "softmax"))
def scaled_dot_product_attention(
    op, stock, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    inputs = (query, key, value, attn_mask)
    batched = query.dim() >= 3 and query.shape[0] == key.shape[0] == value.shape[0]
    if not any(map(covers, inputs)) or dropout_p > 0 or not batched or query.numel() == 0:
        return NotImplemented

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return stock(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if op.config.attention is not None:
        return Attention.apply(*inputs, run, op)
    if enable_gqa or covers(attn_mask) or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return NotImplemented
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Unfused.apply(query, key, value, attn_mask, scale, op)


def _fake_softmax(grad, codes, scales, levels, group, bits):
    return grad.new_empty(grad.shape)


@operator(
    "softmax_backward(Tensor grad, Tensor codes, Tensor scales, Tensor levels, int group, int bits) -> Tensor",
    _fake_softmax,
    family="softmax",
)
def softmax_backward(grad: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, group: int, bits: int) -> Tensor:
    out = grad.new_empty(grad.shape)
    width, dtype = grad.shape[-1], working_type(grad.dtype)
    table = byte_table(levels.to(dtype), bits)
    for start, g in rows(grad, width):
        stop = start + g.shape[0]
        p = decode_rows(codes, scales, table, start, stop, width, group, bits)
        _sum_to_one(p)
        out.view(-1, width)[start:stop] = torch._softmax_backward_data(g.to(dtype), p, -1, dtype)
    return out


def _sum_to_one(p: Tensor) -> None:
    """Makes rows of a decoded map probabilities again: where one is nearly 1, the gradient is a small difference of the
    two.
    """
    p.div_(p.sum(-1, keepdim=True).clamp_min_(torch.finfo(p.dtype).tiny))


class Softmax(torch.autograd.Function):
    """p = run(z), along a dimension, which is the last one of z.permute(order)."""

    @staticmethod
    def forward(ctx, z: Tensor, run, order: tuple[int, ...], op: OpContext):
        p = run(z)
        laid = p.permute(order)
        bits, group, seed = op.config.softmax, op.config.group, op.calibration.seed()
        table = op.calibration.unit(op.site, laid, bits)
        kept = encode_groups(laid, table.bins, table.low, group, bits, table.chances, seed or 0)
        ctx.save_for_backward(*kept)
        ctx.grouped = Grouped(table, tuple(p.shape), order, laid.shape[-1], group)
        ctx.shared, ctx.version = kept, p._version
        return p

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        codes, scales = ctx.saved_tensors
        ctx.shared, grouped, order = None, ctx.grouped, ctx.grouped.order
        dz = softmax_backward(
            grad.permute(order), codes, scales, grouped.table.levels, grouped.group, grouped.table.bits
        )
        return dz.permute(inverse(order)), None, None, None


def codes_of_softmax(p: Tensor) -> tuple[Grouped, Tensor, Tensor] | None:
    """What is kept already of `p`, if it is an unchanged output of a coded softmax that nobody asked for before."""
    node = p.grad_fn
    if type(node) is not Softmax._backward_cls or node.version != p._version or node.shared is None:
        return None
    shared, node.shared = node.shared, None  # once: autograd alone decides how long they live
    return node.grouped, *shared


@handles(F.softmax, torch.softmax, Tensor.softmax, bits="softmax", keywords=("input", "dim", "_stacklevel", "dtype"))
def softmax(op, stock, input, dim=None, *args, **kwargs):
    if not covers(input) or dim is None or input.dim() == 0 or input.numel() == 0:
        return NotImplemented
    places = range(input.dim())

    def run(z: Tensor) -> Tensor:
        return stock(z, dim, *args, **kwargs)

    order = tuple(i for i in places if i != places[dim])
    return Softmax.apply(input, run, (*order, places[dim]), op)
