"""Reads hidden states with learned queries, at the cost of codes of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.activations.chunk_sizes import chunk_sizes
from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.backbones import Hidden

STEP = 1 / 8  # of the codes of normalised tokens


class Feature(nn.Module):
    """Detaches a hidden state and pools it to tokens [B, N, C] in int8, each of mean 0 and variance 1.

    Positions are pooled to at most grid x grid. Normalised, they all fit one grid, of `STEP`: what lies beyond 16
    standard deviations is cut off.
    """

    def __init__(self, hidden: Hidden, grid: int):
        super().__init__()
        self.hidden, self.grid = hidden, grid

    def extra_repr(self) -> str:
        return f"grid={self.grid}"

    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        return joined([self.coded(part) for part in batch_chunks(h)])

    def coded(self, h: Tensor) -> Tensor:
        return self.tokens(h).mul_(1 / STEP).round_().clamp_(-127, 127).to(torch.int8)

    def tokens(self, h: Tensor) -> Tensor:
        """Returns the same before it is coded, in fp32."""
        prefix, patches = self.hidden.split(h)
        height, width = patches.shape[-2:]
        if width == 1 or max(height, width) <= self.grid:  # no map, or a small one
            tokens = self.hidden.to_tokens(h)
        else:
            patches = F.adaptive_avg_pool2d(patches, (min(height, self.grid), min(width, self.grid)))
            tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        return F.layer_norm(tokens.float(), tokens.shape[-1:])


def batch_chunks(h: Tensor) -> tuple[Tensor, ...]:
    """A hidden state as the parts of the batch that are read at a time: all at once would be the peak of a step.

    A graph that is recorded for a batch of any size reads it whole.
    """
    if is_of_any_size(h):
        return (h,)
    return h.split(max(1, chunk_sizes(h.device).pooled * len(h) // max(1, h.numel())))


def are_few(tokens: Tensor, count: int) -> bool:
    """Tells whether such tokens [B, N, C] of `count` blocks are read together; in a recorded graph all are."""
    return is_of_any_size(tokens) or count * tokens.numel() <= chunk_sizes(tokens.device).read


def is_of_any_size(h: Tensor) -> bool:
    """Tells whether a graph is recorded, maybe for batches of another size."""
    return torch.jit.is_tracing() or isinstance(h.shape[0], torch.SymInt)


class DifferentiableFeature(torch.autograd.Function):
    """Pools (hidden state, feature) to the feature's tokens in fp32, with a gradient.

    The gradient is computed in chunks of the batch, from the hidden state alone.
    """

    @staticmethod
    def forward(ctx, h: Tensor, feature: Feature):
        ctx.save_for_backward(h)
        ctx.feature = feature
        return torch.cat([feature.tokens(part) for part in batch_chunks(h)])

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (h,) = ctx.saved_tensors
        out = torch.empty_like(h)
        parts = batch_chunks(h)
        with torch.enable_grad():
            for part, g, o in zip(parts, grad.split(len(parts[0])), out.split(len(parts[0]))):
                x = part.detach().requires_grad_()
                o.copy_(torch.autograd.grad(ctx.feature.tokens(x), x, g)[0])
        return out, None


def attend(t: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means of tokens t [G, B, N, C] weighted by softmax(t q), [G, B, heads, C], and the weights
    [G, B, N, heads].

    query: [G, heads, C].
    """
    weights = torch.softmax((t.flatten(1, 2) @ query.transpose(1, 2)).unflatten(1, t.shape[1:3]), dim=2)
    return weights.transpose(2, 3).to(t.dtype) @ t, weights


class Attend(torch.autograd.Function):
    """Does what `attend` does to tokens in codes of 8 bits: [G, B, heads, C].

    Keeps the codes, once for all heads, and the weights; its gradient is exact. The tokens get none.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, query: Tensor) -> Tensor:
        read, weights = attend(tokens.to(query.dtype), query * STEP)
        ctx.save_for_backward(tokens, weights)
        return read.mul_(STEP)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        tokens, weights = ctx.saved_tensors
        t, grad = tokens.to(grad.dtype), grad * STEP
        g = t @ grad.transpose(2, 3)
        scores = weights * (g - (weights * g).sum(2, keepdim=True))
        scores = (scores * STEP).to(t.dtype)  # before the product, which fp16 may not hold
        return None, scores.flatten(1, 2).transpose(1, 2) @ t.flatten(1, 2)


class Reader(nn.Module):
    """Classifies by tokens [B, N, C]: attention pooling by one learned query a head, a projection of each, a linear
    map.

    The queries begin near zero, where the weights are even and what is read is the mean; the linear map is zero at the
    start. `logits_of` computes the logits from the parameters, so that no hook of these parts is called.
    """

    def __init__(self, channels: int, heads: int, width: int, classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, channels).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(heads, channels, width).normal_(std=channels**-0.5))
        self.norm = nn.LayerNorm(heads * width)
        self.classifier = nn.Linear(heads * width, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)


def logits_of(readers: Sequence[Reader], tokens: Sequence[Tensor]) -> Tensor:
    """Returns the logits [G, B, classes] of G readers of one shape, each by its own tokens [B, N, C].

    Computes all of them at once: of small batches the calls of operators are what takes time.
    """
    read, query = together(tokens), together([r.query for r in readers])
    coded = not read.is_floating_point()
    if coded and torch.is_grad_enabled():
        seen = Attend.apply(read, query)
    else:
        seen = attend(read.to(query.dtype) * (STEP if coded else 1), query)[0]
    heads = torch.einsum("gbhc,ghcw->gbhw", seen, together([r.value for r in readers])).flatten(2)
    shape, eps = heads.shape[-1:], readers[0].norm.eps
    scale, shift, weight, bias = (
        together(parameters)
        for parameters in zip(*((r.norm.weight, r.norm.bias, r.classifier.weight, r.classifier.bias) for r in readers))
    )
    if len(readers) == 1:  # in fewer operators
        return F.linear(F.layer_norm(heads, shape, scale[0], shift[0], eps), weight[0], bias[0])
    normed = F.layer_norm(heads, shape, eps=eps) * scale[:, None] + shift[:, None]
    return torch.baddbmm(bias[:, None], normed, weight.transpose(1, 2))


def together(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors of one shape; of one alone nothing is copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates parts of a batch; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
