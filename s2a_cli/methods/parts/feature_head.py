"""The trained part of a model alone: what it reads of the frozen part goes in, the logits come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from s2a_cli.backbones.head import Head


class Taps:
    """A batch of what a trained part reads, in place of images: tensors [B, ...] that keep their dtypes."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def to(self, target: torch.device | torch.dtype, non_blocking: bool = False) -> Taps:
        """On a device. A dtype, to which images are converted, leaves them as the forward pass gave them."""
        return (
            self
            if isinstance(target, torch.dtype)
            else Taps(t.to(target, non_blocking=non_blocking) for t in self.tensors)
        )

    def split(self, size: int) -> list[Taps]:
        return [Taps(parts) for parts in zip(*(t.split(size) for t in self.tensors))]


class Tail(nn.Module):
    """What a method trains of a model through whose frozen part no gradient passes.

    The modules are the model's own. head: the mean of what its layers return is the model's logits; each reads one of
    the first taps, [B, F]. branch: a module that adds to the logits with `join`; the outputs of its `taps`, modules
    without parameters that the model's blocks call, are the other taps, and `given(tensors)` hands it what it would
    have read. reads: the settings on which the taps depend.
    """

    def __init__(self, head: Head, branch: nn.Module | None = None, reads: str = ""):
        super().__init__()
        self.heads, self.branch, self.reads = nn.ModuleList(head.layers.values()), branch, reads

    def forward(self, taps: Taps) -> Tensor:
        """[B, classes]: those of the model, on the images that the taps are of."""
        first, others = taps.tensors[: len(self.heads)], taps.tensors[len(self.heads) :]
        logits = torch.stack([head(x).flatten(1) for head, x in zip(self.heads, first)]).mean(0)
        if self.branch is None:
            return logits
        self.branch.given(others)
        return self.branch.join(logits)

    @torch.no_grad()
    def capture(self, logits: Callable[[], Tensor]) -> tuple[Taps, Tensor]:
        """The taps of a forward pass of the whole model, which `logits()` makes, and what that returns."""
        first: dict[nn.Module, Tensor] = {}
        others: list[Tensor] = []
        handles = [
            head.register_forward_pre_hook(lambda head, args: first.update({head: args[0]}), prepend=True)
            for head in self.heads
        ]
        taps = self.branch.taps if self.branch is not None else ()
        handles += [tap.register_forward_hook(lambda _, __, output: others.append(output)) for tap in taps]
        try:
            out = logits()
        finally:
            for handle in handles:
                handle.remove()
        return Taps([*(first[head] for head in self.heads), *others]), out
