from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2a_cli.activations import uncoded
from s2a_cli.activations.torch_checkpoint import is_checkpointing
from s2a_cli.backbones import Block, Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import reads_output_only
from s2a_cli.config.schema import AT_LEAST_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BLOCKS, Structure
from s2a_cli.methods.parts.attention_pooling import DifferentiableFeature, Feature, Reader, are_few, logits_of
from s2a_cli.methods.parts.deep_supervision import AuxiliaryHeads
from s2a_cli.methods.parts.feature_head import FeatureHead
from s2a_cli.methods.parts.thread_local import HandedOn


@dataclass
class SideSettings:
    blocks: str = setting("all", help="all | last:K: the blocks that are read", rule=BLOCKS)
    heads: int = setting(
        4, help="learned queries a block, each of which reads one weighted mean of its positions", rule=AT_LEAST_1
    )
    width: int = setting(12, help="numbers that are kept of what a head has read", rule=AT_LEAST_1)
    grid: int = setting(
        7,
        help="hidden states are pooled to at most grid x grid positions, class and register tokens apart",
        rule=AT_LEAST_1,
    )
    lr_scale: float = setting(2.5, help="the branch's learning rate is optim.lr times this", rule=POSITIVE)


class LiteSideBranch(AuxiliaryHeads):
    """Reads each detached hidden state with learned queries; each has a classifier, beside the backbone's head.

    In training each classifier has a loss of its own: what one has learned would otherwise be missing in the gradients
    of the others. Nothing of it is back-propagated through the backbone, except at the blocks numbered in `borders`:
    such a loss trains the blocks from the border before it on, and no gradient crosses it. In evaluation the logits are
    averaged, the branch's with `weight`. The branch's are zero at the start: the classes are those of the pretrained
    model, whose logits are a part of what they were.
    Source: S2A (arXiv 2503.08154), lite side branch; attention pooling instead of channel average pooling, and
    auxiliary losses instead of a ladder, are ours, see docs/structures.md. Losses at borders: Nokland and Eidnes (arXiv
    1901.06656).
    """

    _waiting = HandedOn[tuple[tuple[int, Tensor], ...]]((), between_blocks=False)  # (number of a block, its tokens)

    def __init__(
        self, states: list[Hidden], settings: SideSettings, classes: int, weight: float, borders: Iterable[int] = ()
    ):
        super().__init__()
        self.weight, self.borders = weight, frozenset(borders)
        self.features = nn.ModuleList(Feature(hidden, settings.grid) for hidden in states)
        self.readers = nn.ModuleList(
            Reader(hidden.channels, settings.heads, settings.width, classes) for hidden in states
        )

    @reads_output_only
    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Reads a hidden state, and passes it on. A hook of the block that is read as number `index`."""
        if index == 0:
            self.begin()
        feature, is_border = cast(Feature, self.features[index]), index in self.borders
        h = feature.hidden.of(output)
        tokens = DifferentiableFeature.apply(h, feature) if is_border else feature(h)
        # A border's loss is due before the next segment; a checkpoint computes nothing again but what is within it.
        if is_border or (not torch.compiler.is_compiling() and is_checkpointing()):
            self.classify((index, tokens))
        else:
            self.take(index, tokens)
        return feature.hidden.replaced(output, h.detach()) if is_border else output

    def on_logits(self, model: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        """Adds the branch's logits to the model's. A hook of the model."""
        return self.join(logits)

    def read(self, tensors: list[Tensor]) -> None:
        """Takes the tokens of every block, in place of a forward pass through the blocks."""
        self.begin()
        for index, tokens in enumerate(tensors):
            self.take(index, tokens)

    def begin(self) -> None:
        super().begin()
        self._waiting = ()

    def take(self, index: int, tokens: Tensor) -> None:
        """Makes tokens [B, N, C] wait for others of their shape, to be classified together where they are few."""
        if self._waiting and self._waiting[0][1].shape != tokens.shape:
            self.classify_waiting()
        self._waiting = *self._waiting, (index, tokens)
        if not are_few(tokens, len(self._waiting) + 1):  # with one more like these
            self.classify_waiting()

    def classify_waiting(self) -> None:
        waiting, self._waiting = self._waiting, ()
        if waiting:
            self.classify(*waiting)

    def classify(self, *numbered: tuple[int, Tensor]) -> None:
        """Collects the logits by tokens of one shape [B, N, C], each beside the number of its block."""
        numbers, tokens = zip(*numbered)
        with uncoded():
            logits = logits_of([cast(Reader, self.readers[number]) for number in numbers], tokens)
        self.collect(numbers, logits)

    def join(self, logits: Tensor) -> Tensor:
        """Returns [1 + blocks, B, classes], the model's logits first; in evaluation their weighted mean [B, classes].

        Their sum would name the same class, with probabilities near 1 whatever the image.
        """
        self.classify_waiting()
        auxiliary = [one.to(logits.dtype) for one in self.collected()]
        if self.training:
            return torch.stack([logits, *auxiliary])
        return (logits + self.weight * sum(auxiliary)) / (1 + self.weight * len(auxiliary))


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


class Side(Structure):
    """lite side branch (LSB): learned queries read each hidden state; no gradient passes through the backbone"""

    Settings = SideSettings
    adapts = False
    keeps_features = True

    def attach(self, backbone, beside: Sequence[Attachment] = (), borders: Sequence[Block] = ()):
        """Adds a lite side branch that reads the output of the blocks that `blocks` names.

        Where structures beside it adapt the backbone, its head counts half as much as the whole branch; otherwise as
        one block's. borders: blocks after which no gradient passes. Raises UserError where the branch does not read one
        of them.
        """
        read, settings = backbone.adapted_blocks(self.settings.blocks), self.settings
        if not set(borders) <= set(read):
            raise UserError(
                f"method.side.blocks={settings.blocks} leaves out the last block of a segment: its loss is what trains"
                " the segment"
            )
        weight = 2 / len(read) if any(other.adapts for other in beside) else 1.0
        states = [block.output for block in read]
        branch = LiteSideBranch(states, settings, backbone.head.classes, weight, map(read.index, borders))
        # Bound methods, so that a copy of the model has hooks to its own copy of the branch.
        for index, block in enumerate(read):
            block.module.register_forward_hook(functools.partial(branch.on_block_output, index))
        for block in backbone.blocks if borders else ():
            block.module.register_forward_pre_hook(functools.partial(refuse_shared, block.input), with_kwargs=True)
        backbone.model.register_forward_hook(branch.on_logits)
        backbone.add("side", branch)
        return Attachment(
            backbone,
            adapts=False,
            learning_rates=((branch, settings.lr_scale),),
            auxiliary=(branch,),
            feature_head=FeatureHead(backbone.head, branch, f"blocks={settings.blocks} grid={settings.grid}"),
            unmergeable="a side branch stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = Side
