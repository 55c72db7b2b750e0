from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2a_cli.backbones import ADDED, Backbone, Block, Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.methods.base import Method
from s2a_cli.methods.parts.attention_pooling import Read, Reader, Tap
from s2a_cli.methods.parts.deep_supervision import cast
from s2a_cli.methods.parts.feature_head import Tail


@dataclass
class SideConfig:
    blocks: str = "all"  # all | last:K: the blocks that are read
    heads: int = 4  # learned queries a tap, each of which reads one weighted mean of its positions
    width: int = 12  # numbers that are kept of what a head has read
    grid: int = 7  # taps are pooled to at most grid x grid positions, class and register tokens apart
    lr_scale: float = 2.5  # the branch's learning rate is optim.lr times this


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
