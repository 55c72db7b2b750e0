"""Attention: fused attention keeps codes of q, k and v; a softmax keeps codes of its map.

- scaled_dot_product_attention: backward decodes a few samples at a time and runs the stock attention on them again.
  Masks are kept as they are; a float mask gets its gradient. Not covered, so stock: dropout_p > 0, inputs without a
  batch dimension, and q, k, v of unequal batch.
- softmax over the last dimension: dz = p (g - sum g p). Over another dimension it is stock.

Bytes kept: grouped_size(rows, width, group, bits) for each of q, k, v (width: of a head) and for p (width: keys).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations import levels
from s2a_cli.activations.autograd import covers, first_order
from s2a_cli.activations.codes import byte_table, rows
from s2a_cli.activations.groups import Grouped, keep, slices
from s2a_cli.activations.operators import decode_rows, encode_groups, operator, working_type
from s2a_cli.config import QuantConfig


class Attention(torch.autograd.Function):
    """out = run(q, k, v, mask): q [B, ..., N, d], k and v [B, ..., M, d]."""

    @staticmethod
    def forward(ctx, q, k, v, mask, run, config: QuantConfig):
        kept = [keep(x, config.attention, config.group) for x in (q, k, v)]
        ctx.grouped = [grouped for grouped, _, _ in kept]
        ctx.run = run
        ctx.save_for_backward(mask, *(tensor for _, *tensors in kept for tensor in tensors))
        return run(q, k, v, mask)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        mask, *kept = ctx.saved_tensors
        needs_mask = ctx.needs_input_grad[3]
        totals = [grad.new_empty(g.shape) if need else None for g, need in zip(ctx.grouped, ctx.needs_input_grad)]
        mask_total = torch.zeros_like(mask) if needs_mask else None
        head = math.prod(grad.shape[1:])
        if needs_mask:  # such a mask makes stock attention write out its map
            head = max(head, grad.shape[-2] * mask.shape[-1] * (head // (grad.shape[-2] * grad.shape[-1])))
        for part in slices(grad.shape[0], head):
            inputs = [
                g.decode(*kept[2 * i : 2 * i + 2], grad.dtype, part.start, part.stop) for i, g in enumerate(ctx.grouped)
            ]
            own = mask is not None and mask.dim() == grad.dim() and mask.shape[0] > 1
            inputs.append(mask[part] if own else mask)
            found = _gradients(ctx.run, inputs, ctx.needs_input_grad[:4], grad[part])
            for total, piece in zip(totals, found):
                if total is not None:
                    total[part] = piece
            if needs_mask:
                (mask_total[part] if own else mask_total).add_(found[3])
        return *totals, mask_total, None, None


def _gradients(run, inputs: list[Tensor | None], needed: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """Gradients of run(*inputs) for the inputs that are needed."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
        if inputs[3] is not None and inputs[3].is_floating_point():
            inputs[3] = inputs[3].to(grad.dtype)
        out = run(*inputs)
        found = iter(torch.autograd.grad(out, [x for x, need in zip(inputs, needed) if need], grad))
    return [next(found) if need else None for need in needed]


def scaled_dot_product_attention(
    config, stock, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return stock(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    inputs = (query, key, value, attn_mask)
    batched = query.dim() >= 3 and query.shape[0] == key.shape[0] == value.shape[0]
    if not any(map(covers, inputs)) or dropout_p > 0 or not batched:
        return run(*inputs)
    return Attention.apply(*inputs, run, config)


def _fake_softmax(grad, codes, scales, levels, group, bits):
    return grad.new_empty(grad.shape)


@operator(
    "softmax_backward(Tensor grad, Tensor codes, Tensor scales, Tensor levels, int group, int bits) -> Tensor",
    _fake_softmax,
)
def softmax_backward(grad: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, group: int, bits: int) -> Tensor:
    out = grad.new_empty(grad.shape)
    width, dtype = grad.shape[-1], working_type(grad.dtype)
    table = byte_table(levels.to(dtype), bits)
    for start, g in rows(grad, width):
        stop = start + g.shape[0]
        p = decode_rows(codes, scales, table, start, stop, width, group, bits)
        out.view(-1, width)[start:stop] = torch._softmax_backward_data(g.to(dtype), p, -1, dtype)
    return out


class Softmax(torch.autograd.Function):
    """p = run(z), along the last dimension."""

    @staticmethod
    def forward(ctx, z: Tensor, run, config: QuantConfig):
        p = run(z)
        table = levels.unit(config.softmax, z)
        ctx.grouped = Grouped(table, tuple(p.shape), tuple(range(p.dim())), p.shape[-1], config.group)
        ctx.save_for_backward(*encode_groups(p, table.bins, table.low, config.group, config.softmax))
        ctx.version = p._version
        return p

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        codes, scales = ctx.saved_tensors
        table = ctx.grouped.table
        return softmax_backward(grad, codes, scales, table.levels, ctx.grouped.group, table.bits), None, None


def codes_of_softmax(p: Tensor) -> tuple[Grouped, Tensor, Tensor] | None:
    """What is kept already of `p`, if it is an unchanged output of a coded softmax."""
    node = p.grad_fn
    if type(node) is not Softmax._backward_cls or node.version != p._version:
        return None
    return node.grouped, *node.saved_tensors


def softmax(config, stock, input, dim=None, *args, **kwargs):
    def run(z: Tensor) -> Tensor:
        return stock(z, dim, *args, **kwargs)

    if not covers(input) or dim not in (-1, input.dim() - 1) or input.dim() == 0:
        return run(input)
    return Softmax.apply(input, run, config)


HANDLERS = {
    "attention": {F.scaled_dot_product_attention: scaled_dot_product_attention},
    "softmax": {f: softmax for f in (F.softmax, torch.softmax, Tensor.softmax)},
}
