from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.piece_sizes import piece_sizes
from s2a_cli.backbones import ADDED, Backbone, Block, Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.methods.base import Method
from s2a_cli.methods.parts.deep_supervision import cast
from s2a_cli.methods.parts.feature_head import Tail


@dataclass
class SideConfig:
    blocks: str = "all"  # all | last:K: the blocks that are read
    heads: int = 4  # learned queries a tap, each of which reads one weighted mean of its positions
    width: int = 12  # numbers that are kept of what a head has read
    grid: int = 7  # taps are pooled to at most grid x grid positions, class and register tokens apart
    lr_scale: float = 2.5  # the branch's learning rate is optim.lr times this


STEP = 1 / 8  # of the codes of normalised tokens


class Tap(nn.Module):
    """A detached hidden state as tokens [B, N, C] in int8: positions pooled to a grid, each token to mean 0 and
    variance 1.

    Normalised, they all fit one grid, of `STEP`: what lies beyond 16 standard deviations is cut off.
    """

    def __init__(self, hidden: Hidden, grid: int):
        super().__init__()
        self.hidden, self.grid = hidden, grid

    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([(self.tokens(part) / STEP).round_().clamp_(-127, 127).to(torch.int8) for part in pieces(h)])

    def tokens(self, h: Tensor) -> Tensor:
        """The same before it is coded, in fp32."""
        prefix, patches = self.hidden.split(h)
        if patches.shape[-1] > 1:  # a map; tokens without a square grid stay as they are
            patches = F.adaptive_avg_pool2d(patches, [min(n, self.grid) for n in patches.shape[-2:]])
        tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        return F.layer_norm(tokens.float(), tokens.shape[-1:])


def pieces(h: Tensor) -> tuple[Tensor, ...]:
    """A hidden state as the parts of the batch that are read at a time: all at once would be the peak of a step."""
    return h.split(max(1, piece_sizes(h.device).pooled * len(h) // h.numel()))


class Read(torch.autograd.Function):
    """(hidden state, tap) -> the tap's tokens in fp32, with a gradient, which is computed in pieces from the hidden
    state alone.
    """

    @staticmethod
    def forward(ctx, h: Tensor, tap: Tap):
        ctx.save_for_backward(h)
        ctx.tap = tap
        return torch.cat([tap.tokens(part) for part in pieces(h)])

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (h,) = ctx.saved_tensors
        out = torch.empty_like(h)
        parts = pieces(h)
        with torch.enable_grad():
            for part, g, o in zip(parts, grad.split(len(parts[0])), out.split(len(parts[0]))):
                x = part.detach().requires_grad_()
                o.copy_(torch.autograd.grad(ctx.tap.tokens(x), x, g)[0])
        return out, None


def attend(t: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens t [B, N, C], queries [heads, C] -> the mean of the tokens weighted by softmax(t .

    q), [B, heads, C]; the weights, [B, N, heads].
    """
    weights = torch.softmax(t @ query.T, dim=1)
    return weights.transpose(1, 2).to(t.dtype) @ t, weights


class Attend(torch.autograd.Function):
    """`attend` to tokens in codes, [B, heads, C]. Keeps the codes, once for all heads, and the weights; its gradient is
    exact.

    The tokens get none.
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
    """Tokens [B, N, C] -> a vote [B, classes]: attention pooling by one learned query a head, a projection of each, a
    linear map.

    The queries begin near zero, where the weights are even and what is read is the mean; the linear map is zero at the
    start.
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
        coded = not tokens.is_floating_point()
        seen = Attend.apply(tokens, self.query) if coded else attend(tokens.to(self.query.dtype), self.query)[0]
        read = torch.einsum("bhc,hcw->bhw", seen, self.value)
        return self.vote(self.norm(read.flatten(1)))


class LiteSideBranch(nn.Module):
    """Reads each detached tap with learned queries and votes on the classes by it, beside the backbone's head.

    In training each vote has a loss of its own: what one has learned would otherwise be missing in the gradients of the
    others. Nothing of it is back-propagated through the backbone, except at the blocks numbered in `borders`: such a
    vote trains the blocks from the border before it on, and no gradient crosses it. In evaluation the votes are added,
    the branch's with `weight`; they are zero at the start. Source: S2A (arXiv 2503.08154), lite side branch; attention
    pooling instead of channel average pooling, and votes instead of a ladder, are ours, see docs/structures.md. Losses
    at borders: Nokland and Eidnes (arXiv 1901.06656).
    """

    def __init__(
        self, taps: list[Hidden], config: SideConfig, classes: int, weight: float, borders: Iterable[int] = ()
    ):
        super().__init__()
        self.weight, self.borders = weight, frozenset(borders)
        self.taps = nn.ModuleList(Tap(hidden, config.grid) for hidden in taps)
        self.readers = nn.ModuleList(Reader(hidden.channels, config.heads, config.width, classes) for hidden in taps)
        self._votes: list[Tensor] = []
        self.lr_scale = config.lr_scale  # see make_optimizer

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Votes on a hidden state, and passes it on. A hook of the block that the tap of that number reads."""
        if index == 0:
            self._votes = []
        tap = self.taps[index]
        h = tap.hidden.of(output)
        if index not in self.borders:
            self._vote(index, tap(h))
            return output
        self._vote(index, Read.apply(h, tap))
        return tap.hidden.replaced(output, h.detach())

    def on_logits(self, model: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        """A hook of the model."""
        return self.join(logits)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_votes": []}  # those of a forward pass that did not end can't be copied

    def given(self, tokens: list[Tensor]) -> None:
        """The tokens of every tap, in place of a forward pass through the blocks."""
        self._votes = []
        for index, codes in enumerate(tokens):
            self._vote(index, codes)

    def _vote(self, index: int, tokens: Tensor) -> None:
        self._votes.append(cast(self.readers[index](tokens)))

    def join(self, logits: Tensor) -> Tensor:
        """The model's logits with the votes on the way to them: [1 + taps, B, classes], or [B, classes] in
        evaluation.
        """
        votes, self._votes = [vote.to(logits.dtype) for vote in self._votes], []
        return torch.stack([logits, *votes]) if self.training else logits + self.weight * sum(votes)


def refuse_shared(hidden: Hidden, block: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook.

    Raises UserError for a block that is handed a trained tensor beside its hidden state: it crosses borders.
    """
    state = hidden.of((args, kwargs))
    if any(isinstance(x, Tensor) and x.requires_grad and x is not state for x in tree_leaves((args, kwargs))):
        raise UserError(
            "method.segments: the blocks of this backbone share a trained part, so no gradient can stay within a"
            " segment; 1 is accepted"
        )


def add_side(backbone: Backbone, config: SideConfig, peers: bool, borders: Sequence[Block] = ()) -> None:
    """Adds a lite side branch that reads the output of the blocks that `config.blocks` names.

    peers: the head counts half as much as the whole branch, as where the backbone adapts for it; otherwise as one tap.
    borders: blocks after which no gradient passes. Raises UserError where the branch does not read one of them.
    """
    read = backbone.adapted_blocks(config.blocks)
    if not set(borders) <= set(read):
        raise UserError(
            f"method.side.blocks={config.blocks} leaves out the last block of a segment: its vote is what trains the"
            " segment"
        )
    weight = 2 / len(read) if peers else 1.0
    branch = LiteSideBranch([b.output for b in read], config, backbone.head.classes, weight, map(read.index, borders))
    # Bound methods, so that a copy of the model has hooks to its own copy of the branch.
    for index, block in enumerate(read):
        block.module.register_forward_hook(functools.partial(branch.on_block_output, index))
    for block in backbone.blocks if borders else ():
        block.module.register_forward_pre_hook(functools.partial(refuse_shared, block.input), with_kwargs=True)
    backbone.model.register_forward_hook(branch.on_logits)
    backbone.add("side", branch)


class Side(Method):
    """lite side branch (LSB): learned queries read each hidden state and vote; nothing is back-propagated through the
    backbone
    """

    @dataclass
    class Config(SideConfig, Method.Config):
        pass

    def attach(self, backbone):
        add_side(backbone, self.config, peers=False)

    def tail(self, backbone):
        return Tail(
            backbone.head,
            getattr(backbone.model, ADDED)["side"],
            f"blocks={self.config.blocks} grid={self.config.grid}",
        )


METHOD = Side
