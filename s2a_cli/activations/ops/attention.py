"""Attention: fused attention keeps codes of q, k and v; a softmax keeps codes of its map.

- scaled_dot_product_attention: backward dequantizes a few samples at a time and runs PyTorch's attention on them again.
  A float mask gets its gradient. One that has rows for each sample and needs a gradient is kept in bfloat16, others as
  they are.
  Falls back to PyTorch for dropout_p > 0, inputs without a batch dimension, and q, k, v of unequal batch.
- the same with `softmax` bits and no `attention` bits, as the S2A paper has it: unfused, with q, k and v kept as they
  are and the map as codes. Alone among all operators its output equals PyTorch's to rounding, not to the bit. It runs a
  few samples at a time, so that the map never exists whole. Falls back for a mask with a gradient and grouped queries.
- softmax over a dimension: dz = p (g - sum g p), with scales along that dimension. Dequantized rows of p are divided by
  their sum.

Bytes kept: groupwise_size(rows, width, group, bits) for each of q, k, v (width: of a head) and for p (width: keys).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import covers, first_order
from s2a_cli.activations.ops.registry import handles
from s2a_cli.activations.quant.groupwise import GroupwiseLayout, decoded_chunks, keep_quantized, write_chunk
from s2a_cli.activations.quant.packing import byte_table, inverse, rows
from s2a_cli.activations.quant.primitives import (
    dequantize_groupwise,
    dequantize_rows,
    operator,
    quantize_groupwise,
    working_type,
)

if TYPE_CHECKING:
    from s2a_cli.activations.context import OpContext


class Attention(torch.autograd.Function):
    """Computes out = run(q, k, v, mask) of q [B, ..., N, d], k and v [B, ..., M, d], and keeps codes of q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, mask, run, op: OpContext):
        bits, group_size = op.bits("attention"), op.config.group
        kept = [keep_quantized(x, bits, group_size, seed=op.calibration.seed()) for x in (q, k, v)]
        ctx.layouts = [layout for layout, _, _ in kept]
        ctx.run = run
        # A mask that depends on each sample is an activation like the others, as large as the map itself.
        is_activation = ctx.needs_input_grad[3] and _is_own(mask, q)
        kept_mask = _rounded(mask) if is_activation and mask is not None else mask
        ctx.save_for_backward(kept_mask, *(tensor for _, *tensors in kept for tensor in tensors))
        return run(q, k, v, mask)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        mask, *kept = ctx.saved_tensors
        needs_mask = ctx.needs_input_grad[3]
        totals: list[Any] = [None] * len(ctx.layouts)  # tensors, where there is a gradient
        is_own = mask is not None and _is_own(mask, grad)
        width = 0 if mask is None else mask.shape[-1]
        head = math.prod(grad.shape[1:])
        if needs_mask:  # such a mask makes PyTorch's attention write out its map
            totals.append(None if is_own or mask is None else torch.zeros_like(mask))
            head = max(head, grad.shape[-2] * width * (head // (grad.shape[-2] * grad.shape[-1])))
        for chunk in decoded_chunks(grad, head):
            span = grad.dtype, chunk.start, chunk.stop
            inputs = [layout.dequantize(*kept[2 * i : 2 * i + 2], *span) for i, layout in enumerate(ctx.layouts)]
            inputs.append(mask if mask is None or not is_own else mask[chunk])
            found = _gradients(ctx.run, inputs, ctx.needs_input_grad[:4], grad[chunk])
            for index, (total, result) in enumerate(zip(totals, found)):
                if result is None:
                    continue
                if index == 3 and not is_own:
                    total.add_(result)
                else:
                    totals[index] = write_chunk(total, result, chunk, len(grad))
        return *totals[:3], totals[3] if needs_mask else None, None, None


def _is_own(mask: Tensor, like: Tensor) -> bool:
    """Returns whether a mask has rows for each sample."""
    return mask.dim() == like.dim() and mask.shape[0] > 1


def _rounded(mask: Tensor) -> Tensor:
    """Returns a float mask in bfloat16: beside -100 or -inf, which mask, codes of fewer bits lose its other numbers."""
    if mask.element_size() <= 2:
        return mask
    least = torch.finfo(torch.bfloat16).min
    return torch.where(mask.isinf(), mask, mask.clamp(least, -least)).to(torch.bfloat16)


def _gradients(run: Callable, inputs: list, needed: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """Returns the gradients of run(*inputs) for the inputs that need one, None for others."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
        if inputs[3] is not None and inputs[3].is_floating_point():
            inputs[3] = inputs[3].to(grad.dtype)
        out = run(*inputs)
        found = iter(torch.autograd.grad(out, [x for x, need in zip(inputs, needed) if need], grad))
    return [next(found) if need else None for need in needed]


class Unfused(torch.autograd.Function):
    """Computes softmax(q k^T scale + mask) v a few samples at a time, and keeps q, k, v and codes of the map."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale: float, op: OpContext):
        ctx.scale, ctx.bits, ctx.group_size = scale, op.bits("softmax"), op.config.group
        site, kept, out = op.site, [], None
        ctx.chunks = list(decoded_chunks(q, math.prod(q.shape[1:-1]) * k.shape[-2]))
        for chunk in ctx.chunks:
            scores = torch.matmul(q[chunk], k[chunk].mT).mul_(scale)
            if mask is not None:
                bias = mask[chunk] if mask.dim() == q.dim() and len(mask) > 1 else mask
                scores = scores.masked_fill_(~bias, -math.inf) if mask.dtype == torch.bool else scores.add_(bias)
            p = torch.softmax(scores, -1, dtype=working_type(scores.dtype))
            if mask is not None:  # PyTorch's attention returns 0 where all is masked
                p.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
            del scores
            codebook, seed = op.calibration.unit(site, p, ctx.bits), op.calibration.seed() or 0
            kept += quantize_groupwise(
                p, codebook.bin_codes, codebook.low, ctx.group_size, ctx.bits, codebook.chances, seed
            )
            result = torch.matmul(p.to(v.dtype), v[chunk])
            out = result.new_empty((len(q), *result.shape[1:])) if out is None else out
            out[chunk] = result
        ctx.entries = codebook.entries
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = (grad.new_empty(x.shape) for x in (q, k, v))
        width, dtype = k.shape[-2], grad.dtype
        for index, chunk in enumerate(ctx.chunks):
            packed, scales = kept[2 * index : 2 * index + 2]
            g = grad[chunk]
            p = dequantize_groupwise(
                packed, scales, ctx.entries, width, ctx.group_size, ctx.bits, 0, len(scales), dtype
            )
            _sum_to_one(p)
            dv[chunk] = torch.matmul(p.view(*g.shape[:-1], width).mT, g)
            del p
            dp = torch.matmul(g, v[chunk].to(dtype).mT)
            dz = softmax_backward(dp, packed, scales, ctx.entries, ctx.group_size, ctx.bits).mul_(ctx.scale)
            dq[chunk] = torch.matmul(dz, k[chunk].to(dtype))
            dk[chunk] = torch.matmul(dz.mT, q[chunk].to(dtype))
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


def _fake_softmax(grad, packed, scales, entries, group_size, bits):
    return grad.new_empty(grad.shape)


@operator(
    "softmax_backward(Tensor grad, Tensor packed, Tensor scales, Tensor entries, int group_size, int bits) -> Tensor",
    _fake_softmax,
    family="softmax",
)
def softmax_backward(
    grad: Tensor, packed: Tensor, scales: Tensor, entries: Tensor, group_size: int, bits: int
) -> Tensor:
    out = grad.new_empty(grad.shape)
    width, dtype = grad.shape[-1], working_type(grad.dtype)
    table = byte_table(entries.to(dtype), bits)
    for start, g in rows(grad, width):
        stop = start + g.shape[0]
        p = dequantize_rows(packed, scales, table, start, stop, width, group_size, bits)
        _sum_to_one(p)
        out.view(-1, width)[start:stop] = torch._softmax_backward_data(g.to(dtype), p, -1, dtype)
    return out


def _sum_to_one(p: Tensor) -> None:
    """Makes rows of a decoded map probabilities again: where one is nearly 1, the gradient is a small difference of the
    two.
    """
    p.div_(p.sum(-1, keepdim=True).clamp_min_(torch.finfo(p.dtype).tiny))


class Softmax(torch.autograd.Function):
    """Computes p = run(z), along a dimension, which is the last one of z.permute(order), and keeps codes of p."""

    @staticmethod
    def forward(ctx, z: Tensor, run, order: tuple[int, ...], op: OpContext):
        p = run(z)
        laid = p.permute(order)
        bits, group_size, seed = op.bits("softmax"), op.config.group, op.calibration.seed()
        codebook = op.calibration.unit(op.site, laid, bits)
        kept = quantize_groupwise(laid, codebook.bin_codes, codebook.low, group_size, bits, codebook.chances, seed or 0)
        ctx.save_for_backward(*kept)
        ctx.layout = GroupwiseLayout(codebook, tuple(p.shape), order, laid.shape[-1], group_size)
        ctx.shared, ctx.version = kept, p._version
        return p

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        packed, scales = ctx.saved_tensors
        ctx.shared, layout, order = None, ctx.layout, ctx.layout.order
        dz = softmax_backward(
            grad.permute(order), packed, scales, layout.codebook.entries, layout.group_size, layout.codebook.bits
        )
        return dz.permute(inverse(order)), None, None, None


def quantized_softmax(p: Tensor) -> tuple[GroupwiseLayout, Tensor, Tensor] | None:
    """Returns what is kept of `p`, if it is an unchanged output of a quantized softmax that nobody asked for before."""
    node: Any = p.grad_fn
    if type(node) is not Softmax._backward_cls or node.version != p._version or node.shared is None:
        return None
    shared, node.shared = node.shared, None  # once: autograd alone decides how long they live
    return node.layout, *shared


@handles(F.softmax, torch.softmax, Tensor.softmax, bits="softmax", keywords=("input", "dim", "_stacklevel", "dtype"))
def softmax(op, stock, input, dim=None, *args, **kwargs):
    if not covers(input) or dim is None or input.dim() == 0 or input.numel() == 0:
        return NotImplemented
    places = range(input.dim())

    def run(z: Tensor) -> Tensor:
        return stock(z, dim, *args, **kwargs)

    order = tuple(i for i in places if i != places[dim])
    return Softmax.apply(input, run, (*order, places[dim]), op)
