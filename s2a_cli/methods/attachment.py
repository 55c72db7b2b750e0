"""What a training loop must know of the structures that are attached to a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from s2a_cli.backbones import Backbone
from s2a_cli.backbones.frozen_weights import restore
from s2a_cli.common.errors import UserError
from s2a_cli.methods.parts.deep_supervision import AuxiliaryHeads, Learn
from s2a_cli.methods.parts.feature_head import FeatureHead
from s2a_cli.methods.parts.plain_weights import unmergeable
from s2a_cli.methods.parts.tail import Tail, tail_of


@dataclass(frozen=True)
class Attachment:
    """A backbone with what has been attached to it.

    adapts: whether the backbone computes something else than before, or a gradient passes through it.
    learning_rates: (module, factor): the learning rate of the module's parameters is the run's times this.
    auxiliary: heads whose losses are back-propagated within the forward pass.
    feature_head: what is trained, alone, where the backbone is not adapted and what is read of it can be kept; or what
    is behind the first blocks.
    after_step: each is called with the optimizer after every update of the parameters. Bound methods of the modules, as
    `merges`.
    unmergeable: why no plain weights of the backbone compute the same; empty where they do.
    replaces_layers: whether layers of its own are in the place of the backbone's, within what other hooks see of them.
    merges: (layer, merge): each moves what an added module computes into the weights of a layer of the backbone. Bound
    methods of the modules, so that a copy of the attachment merges its own.
    """

    backbone: Backbone
    adapts: bool = True
    learning_rates: tuple[tuple[nn.Module, float], ...] = ()
    auxiliary: tuple[AuxiliaryHeads, ...] = ()
    feature_head: FeatureHead | Tail | None = None
    after_step: tuple[Callable[[Optimizer], None], ...] = ()
    unmergeable: str = ""
    replaces_layers: bool = False
    merges: tuple[tuple[nn.Module, Callable[[], None]], ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the backbone, in order."""
        return self.backbone.block_modules

    def with_learning_rates(self, modules: Iterable[nn.Module], factor: float) -> Attachment:
        """Returns this attachment with another learning rate for some modules."""
        return replace(self, learning_rates=(*self.learning_rates, *((module, factor) for module in modules)))

    def with_tail(self) -> Attachment:
        """Returns this attachment with what is behind the first blocks to be trained alone, where there are some."""
        return replace(self, feature_head=tail_of(self.backbone))

    def trained(self, cached: bool) -> nn.Module:
        """Returns what batches go through: the model, or what is trained of it where features of the rest are kept."""
        return self.feature_head if cached and self.feature_head else self.model

    def passed_blocks(self) -> list[nn.Module]:
        """Returns the blocks that a gradient passes: the first that trains or is changed, and those behind it."""
        before = tail_of(self.backbone)
        return [block for block in self.blocks if not before or block not in before.kept]

    def running_blocks(self, cached: bool) -> list[nn.Module]:
        """Returns the blocks that run in a pass, in order: where features are kept, those that a gradient passes."""
        return self.blocks if self.trained(cached) is self.model else self.passed_blocks()

    @contextmanager
    def learning(self, learn: Learn) -> Iterator[None]:
        """Hands auxiliary logits to `learn` within, which back-propagates their losses at once."""
        with ExitStack() as stack:
            for heads in self.auxiliary:
                stack.enter_context(heads.learning(learn))
            yield

    def merge(self) -> nn.Module:
        """Returns the backbone's model, whose own weights now hold all that was trained; nothing added is left in it.

        Weights that were stored in fewer bits become parameters again, of the values that were computed with. Raises
        UserError where a structure adds what no weight of the backbone can hold.
        """
        if self.unmergeable:
            raise UserError(self.unmergeable)
        restore(self.model)
        with torch.no_grad():
            for _, merge in self.merges:
                merge()
        self.backbone.remove_added()
        return self.model

    @staticmethod
    def of(parts: Sequence[Attachment]) -> Attachment:
        """Returns several attachments to one backbone as one."""
        first, adapts = parts[0], any(part.adapts for part in parts)
        heads = [part.feature_head for part in parts if isinstance(part.feature_head, FeatureHead)]
        heads.sort(key=lambda head: head.branch is None)
        merges = tuple(pair for part in _as_computed(parts) for pair in part.merges)
        reasons = [
            *(part.unmergeable for part in parts),
            unmergeable(first.backbone.model, (layer for layer, _ in merges)),
        ]
        alone = len(heads) == len(parts) and sum(head.branch is not None for head in heads) < 2 and not adapts
        return Attachment(
            first.backbone,
            adapts,
            learning_rates=tuple(pair for part in parts for pair in part.learning_rates),
            auxiliary=tuple(heads for part in parts for heads in part.auxiliary),
            feature_head=heads[0] if alone else None,
            after_step=tuple(act for part in parts for act in part.after_step),
            unmergeable="; ".join(filter(None, reasons)),
            replaces_layers=any(part.replaces_layers for part in parts),
            merges=merges,
        )


def _as_computed(parts: Sequence[Attachment]) -> list[Attachment]:
    """Returns attachments in the order in which they change what a layer computes.

    The last layer that was put in the place of another is called first, and hooks run as they were registered.
    """
    replacing = [part for part in reversed(parts) if part.replaces_layers]
    return [*replacing, *(part for part in parts if not part.replaces_layers)]
