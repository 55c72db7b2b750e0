"""Reads hidden states with learned queries, at the cost of codes of 8 bits."""

from __future__ import annotations

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
        return torch.cat(
            [(self.tokens(part) / STEP).round_().clamp_(-127, 127).to(torch.int8) for part in batch_chunks(h)]
        )

    def tokens(self, h: Tensor) -> Tensor:
        """Returns the same before it is coded, in fp32."""
        prefix, patches = self.hidden.split(h)
        if patches.shape[-1] > 1:  # a map; tokens without a square grid stay as they are
            height, width = (min(n, self.grid) for n in patches.shape[-2:])
            patches = F.adaptive_avg_pool2d(patches, (height, width))
        tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        return F.layer_norm(tokens.float(), tokens.shape[-1:])


def batch_chunks(h: Tensor) -> tuple[Tensor, ...]:
    """A hidden state as the parts of the batch that are read at a time: all at once would be the peak of a step.

    A graph that is recorded for a batch of any size reads it whole.
    """
    if torch.jit.is_tracing() or isinstance(h.shape[0], torch.SymInt):
        return (h,)
    return h.split(max(1, chunk_sizes(h.device).pooled * len(h) // max(1, h.numel())))


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
    """Returns the means of tokens t [B, N, C] weighted by softmax(t q), [B, heads, C], and the weights [B, N, heads].

    query: [heads, C].
    """
    weights = torch.softmax(t @ query.T, dim=1)
    return weights.transpose(1, 2).to(t.dtype) @ t, weights


class Attend(torch.autograd.Function):
    """Does what `attend` does to tokens in codes of 8 bits: [B, heads, C].

    Keeps the codes, once for all heads, and the weights; its gradient is exact. The tokens get none.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, query: Tensor) -> Tensor:
        read, weights = attend(tokens.to(query.dtype) * STEP, query)
        ctx.save_for_backward(tokens, weights)
        return read

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        tokens, weights = ctx.saved_tensors
        t = tokens.to(grad.dtype) * STEP
        g = t @ grad.transpose(1, 2)
        scores = weights * (g - (weights * g).sum(1, keepdim=True))
        return None, torch.einsum("bnh,bnc->hc", scores.to(t.dtype), t)


class Reader(nn.Module):
    """Classifies by tokens [B, N, C]: attention pooling by one learned query a head, a projection of each, a linear
    map.

    Returns logits [B, classes]. The queries begin near zero, where the weights are even and what is read is the mean;
    the linear map is zero at the start.
    """

    def __init__(self, channels: int, heads: int, width: int, classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, channels).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(heads, channels, width).normal_(std=channels**-0.5))
        self.norm = nn.LayerNorm(heads * width)
        self.classifier = nn.Linear(heads * width, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        coded = not tokens.is_floating_point()
        if coded and torch.is_grad_enabled():
            seen = Attend.apply(tokens, self.query)
        else:
            seen = attend(tokens.to(self.query.dtype) * (STEP if coded else 1), self.query)[0]
        read = torch.einsum("bhc,hcw->bhw", seen, self.value)
        return self.classifier(self.norm(read.flatten(1)))
