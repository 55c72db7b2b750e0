"""Adds to what a residual branch computes, from within the block: a block that is recomputed recomputes this too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from s2a_cli.backbones import Backbone, Block
from s2a_cli.backbones.branches import Branch
from s2a_cli.methods.parts.bottleneck import OnMap
from s2a_cli.methods.parts.thread_local import ThreadLocal

if TYPE_CHECKING:
    from s2a_cli.methods.base import Structure

Reads = Literal["added", "state", "normed", "sum"]


class BranchAdapter(nn.Module):
    """Makes h + e of a residual branch h + e + inner(z), where e = end(layer(norm(h))).

    reads: what z is. added: e, so `inner` comes after the branch; state: h, beside the branch and its norm; normed:
    norm(h), beside the branch, behind its norm; sum: h + e, after the residual sum.
    """

    _seen = ThreadLocal[Tensor | None](None)  # h or norm(h), while the branch runs

    def __init__(self, inner: nn.Module, reads: Reads):
        super().__init__()
        self.inner, self.reads = inner, reads

    def act_on(self, branch: Branch) -> None:
        """Registers the hooks."""
        if self.reads == "normed":
            branch.norm.register_forward_hook(self.on_normed)
        elif self.reads != "added":
            branch.norm.register_forward_pre_hook(self.on_state)
        branch.end.register_forward_hook(self.on_added)

    def on_state(self, norm: nn.Module, args: tuple) -> None:
        """Keeps the hidden state. A forward pre-hook of the branch's norm."""
        self._seen = args[0]

    def on_normed(self, norm: nn.Module, args: tuple, normed: Tensor) -> None:
        """Keeps the normalised hidden state. A forward hook of the branch's norm."""
        self._seen = normed

    def on_added(self, end: nn.Module, args: tuple, added: Tensor) -> Tensor:
        """Adds what `inner` makes of what it reads. A forward hook of the branch's last module."""
        seen, self._seen = self._seen, None
        if seen is None:
            seen = added
        elif self.reads == "sum":
            seen = seen + added
        return added + self.inner(seen).to(added.dtype)


def adapted_branches(
    structure: Structure, backbone: Backbone, kinds: Collection[str] = ("attention", "mlp")
) -> list[tuple[Block, Branch]]:
    """Returns the branches of these kinds, each with its block, of the blocks that the structure's settings name.

    Raises UserError where a block is no sequence of branches that have their channels last.
    """
    blocks = backbone.adapted_blocks(structure.settings.blocks)
    if not all(block.branches and block.input.layout != "channels_first" for block in blocks):
        raise structure.misfit(
            backbone, "its blocks are not residual branches of attention and an MLP, each behind a norm"
        )
    return [(block, branch) for block in blocks for branch in block.branches if branch.kind in kinds]


def adapt_branches(
    structure: Structure,
    backbone: Backbone,
    make: Callable[[Block], nn.Module],
    reads: Reads,
    kinds: Collection[str] = ("attention", "mlp"),
) -> None:
    """Adds a BranchAdapter of `make(block)` to each of the `adapted_branches`."""
    adapters = nn.ModuleList()
    for block, branch in adapted_branches(structure, backbone, kinds):
        adapter = BranchAdapter(make(block), reads)
        for inner in adapter.modules():
            if isinstance(inner, OnMap):
                block.module.register_forward_pre_hook(inner.on_block_input, with_kwargs=True, prepend=True)
        adapter.act_on(branch)
        adapters.append(adapter)
    backbone.add(structure.name, adapters)
