from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.activations.autograd import first_order
from s2a_cli.backbones import ADDED, Backbone, Hidden
from s2a_cli.methods.base import Method
from s2a_cli.tail import Tail


@dataclass
class SideConfig:
    blocks: str = "all"  # all | last:K: the blocks that are read
    heads: int = 4  # learned queries a tap, each of which reads one weighted mean of its positions
    width: int = 12  # numbers that are kept of what a head has read
    grid: int = 7  # taps are pooled to at most grid x grid positions, class and register tokens apart
    lr_scale: float = 2.5  # the branch's learning rate is optim.lr times this


STEP = 1 / 8  # of the codes of normalised tokens
PIECE = 2**21  # elements that are pooled and normalised at a time; all at once would be the peak of a step


class Tap(nn.Module):
    """A detached hidden state as tokens [B, N, C] in int8: positions pooled to a grid, each token to mean 0 and variance 1.

    They are kept for the backward pass. Normalised, they all fit one grid, of `STEP`: what lies beyond 16 standard deviations is cut off.
    """

    def __init__(self, hidden: Hidden, grid: int):
        super().__init__()
        self.hidden, self.grid = hidden, grid

    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        images = max(1, PIECE * len(h) // h.numel())
        return torch.cat([self.codes(part) for part in h.split(images)])

    def codes(self, h: Tensor) -> Tensor:
        prefix, patches = self.hidden.split(h)
        if patches.shape[-1] > 1:  # a map; tokens without a square grid stay as they are
            patches = F.adaptive_avg_pool2d(patches, [min(n, self.grid) for n in patches.shape[-2:]])
        tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        return (F.layer_norm(tokens.float(), tokens.shape[-1:]) / STEP).round_().clamp_(-127, 127).to(torch.int8)


class Attend(torch.autograd.Function):
    """(tokens [B, N, C] as codes, queries [heads, C]) -> [B, heads, C], the mean of the tokens t weighted by softmax(t . q).

    Keeps the codes, once for all heads, and the weights; its gradient is exact. The tokens get none.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, query: Tensor) -> Tensor:
        t = tokens.to(query.dtype) * STEP
        weights = torch.softmax(t @ query.T, dim=1)  # [B, N, heads]
        ctx.save_for_backward(tokens, weights)
        return weights.transpose(1, 2).to(t.dtype) @ t

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        tokens, weights = ctx.saved_tensors
        t = tokens.to(grad.dtype) * STEP
        g = t @ grad.transpose(1, 2)
        scores = weights * (g - (weights * g).sum(1, keepdim=True))
        return None, torch.einsum("bnh,bnc->hc", scores.to(t.dtype), t)


class Reader(nn.Module):
    """Tokens [B, N, C] -> a vote [B, classes]: attention pooling by one learned query a head, a projection of each, a linear map.

    The queries begin near zero, where the weights are even and what is read is the mean; the linear map is zero at the start.
    """

    def __init__(self, channels: int, heads: int, width: int, classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, channels).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(heads, channels, width).normal_(std=channels**-0.5))
        self.norm = nn.LayerNorm(heads * width)
        self.vote = nn.Linear(heads * width, classes)
        nn.init.zeros_(self.vote.weight)
        nn.init.zeros_(self.vote.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        read = torch.einsum("bhc,hcw->bhw", Attend.apply(tokens, self.query), self.value)
        return self.vote(self.norm(read.flatten(1)))


class LiteSideBranch(nn.Module):
    """Reads each detached tap with learned queries and votes on the classes by it, beside the backbone's head.

    Nothing is back-propagated through the backbone. In training each vote has a loss of its own: what one has learned would
    otherwise be missing in the gradients of the others. In evaluation the votes are added, the branch's with `weight`; they are
    zero at the start.
    Source: S2A (arXiv 2503.08154), lite side branch; attention pooling instead of channel average pooling, and votes instead
    of a ladder, are ours, see docs/structures.md.
    """

    def __init__(self, taps: list[Hidden], config: SideConfig, classes: int, weight: float):
        super().__init__()
        self.weight = weight
        self.taps = nn.ModuleList(Tap(hidden, config.grid) for hidden in taps)
        self.readers = nn.ModuleList(Reader(hidden.channels, config.heads, config.width, classes) for hidden in taps)
        self._tokens: list[Tensor] = []
        self.lr_scale = config.lr_scale  # see make_optimizer

    def tap(self, index: int, h: Tensor) -> None:
        if index == 0:
            self._tokens = []
        self._tokens.append(self.taps[index](h))

    def given(self, tokens: list[Tensor]) -> None:
        """The tokens of every tap, in place of a forward pass through the blocks."""
        self._tokens = tokens

    def join(self, logits: Tensor) -> Tensor:
        """The head's logits with the votes on what was tapped on the way to them: [1 + taps, B, classes], or [B, classes] in evaluation."""
        tokens, self._tokens = self._tokens, []
        votes = [vote.to(logits.dtype) for vote in self(*tokens)]
        return torch.stack([logits, *votes]) if self.training else logits + self.weight * sum(votes)

    def forward(self, *tokens: Tensor) -> list[Tensor]:
        """The tokens of every tap, [B, N, C] each -> a vote of each, [B, classes]."""
        return [reader(t) for reader, t in zip(self.readers, tokens)]


def add_side(backbone: Backbone, config: SideConfig, peers: bool) -> None:
    """Adds a lite side branch that reads the output of the blocks that `config.blocks` names.

    peers: the head counts half as much as the whole branch, as where the backbone adapts for it; otherwise as one tap.
    """
    read = backbone.adapted_blocks(config.blocks)
    weight = 2 / len(read) if peers else 1.0
    branch = LiteSideBranch([block.output for block in read], config, backbone.head.out_features, weight)
    for index, block in enumerate(read):
        block.module.register_forward_hook(lambda _, __, h, index=index: branch.tap(index, h))
    backbone.head.register_forward_hook(lambda _, __, logits: branch.join(logits))
    backbone.add("side", branch)


class Side(Method):
    """lite side branch (LSB): learned queries read each hidden state and vote; nothing is back-propagated through the backbone"""

    @dataclass
    class Config(SideConfig, Method.Config):
        pass

    def attach(self, backbone):
        add_side(backbone, self.config, peers=False)

    def tail(self, backbone):
        return Tail(backbone.head, getattr(backbone.model, ADDED)["side"], f"blocks={self.config.blocks} grid={self.config.grid}")


METHOD = Side
