"""The trained part of a model alone: the features that it reads of the frozen part go in, the logits come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s2a_cli.backbones.head import Head


class Features:
    """A batch of what a trained part reads, in place of images: tensors [B, ...] that keep their dtypes."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Tensor) -> Features:
        return Features(t[index] for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def to(self, device: torch.device, non_blocking: bool = False) -> Features:
        """Moves them to a device."""
        return Features(t.to(device, non_blocking=non_blocking) for t in self.tensors)

    def split(self, size: int) -> list[Features]:
        return [Features(parts) for parts in zip(*(t.split(size) for t in self.tensors))]


class SideBranch(Protocol):
    """A module that reads features of a frozen backbone and adds to its logits."""

    # Modules without parameters; what they return is all that is read of a block's output. A hook of the block calls
    # one, functools.partial(branch.on_block_output, its number).
    features: nn.ModuleList

    def read(self, tensors: list[Tensor]) -> None:
        """Takes what `features` would have returned, in place of a forward pass through the blocks."""
        ...

    def join(self, logits: Tensor) -> Tensor:
        """Returns the model's logits with the branch's."""
        ...


class FeatureHead(nn.Module):
    """What is trained of a model through whose frozen part no gradient passes.

    The modules are the model's own. head: the mean of what its layers return is the model's logits; each reads one of
    the first features, [B, F]. branch: reads the other features and adds to the logits. settings: those on which the
    features depend. `misfit` says of a model what does not go with that.
    """

    misfit = "the logits of {} are more than the mean of its classifier's layers"

    def __init__(self, head: Head, branch: SideBranch | None = None, settings: str = ""):
        super().__init__()
        self.heads, self.branch, self.settings = nn.ModuleList(head.layers.values()), branch, settings

    @property
    def about(self) -> list[Any]:
        """What the features depend on, beside the backbone."""
        return [self.branch is not None, self.settings]

    def forward(self, features: Features) -> Tensor:
        """Returns the model's logits [B, classes] on the images that the features are of."""
        first, others = features.tensors[: len(self.heads)], features.tensors[len(self.heads) :]
        logits = torch.stack([head(x).flatten(1) for head, x in zip(self.heads, first)]).mean(0)
        if self.branch is None:
            return logits
        self.branch.read(others)
        return self.branch.join(logits)

    @torch.no_grad()
    def capture(self, logits: Callable[[], Tensor], whole: bool = True) -> tuple[Features, Tensor]:
        """Returns the features of a forward pass of the model, which `logits()` makes, and what that returns.

        whole: has no effect here, where the last layers read a part of the features.
        """
        first: dict[nn.Module, Tensor] = {}
        others: list[Tensor] = []

        def keep(feature: nn.Module, args: tuple, output: Tensor) -> None:
            others.append(output)

        handles = [
            head.register_forward_pre_hook(lambda head, args: first.update({head: args[0]}), prepend=True)
            for head in self.heads
        ]
        read = self.branch.features if self.branch is not None else ()
        handles += [feature.register_forward_hook(keep) for feature in read]
        try:
            out = logits()
        finally:
            for handle in handles:
                handle.remove()
        return Features([*(first[head] for head in self.heads), *others]), out
