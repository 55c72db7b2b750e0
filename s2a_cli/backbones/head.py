"""The classifier of a model: the layers whose size is the number of classes, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Head:
    """layers: {name: a linear layer or a 1x1 convolution}; of several, the model adds up or averages what they
    return.
    """

    layers: dict[str, nn.Module]
    classes: int

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from layer.parameters()

    def holds(self, name: str) -> bool:
        """Whether this is the name of one of the layers, or of a tensor of one."""
        return name in self.layers or name.rpartition(".")[0] in self.layers


def find_head(model: nn.Module, other: nn.Module, classes: int) -> Head:
    """The head of a model for `classes` classes; `other` is the same model for another number.

    Empty where there is none.
    """
    shapes = {name: p.shape for name, p in other.named_parameters()}
    names = [name.rpartition(".")[0] for name, p in model.named_parameters() if shapes.get(name) != p.shape]
    return Head({name: model.get_submodule(name) for name in dict.fromkeys(names)}, classes)


class Classified(nn.Module):
    """A model that returns features [B, C], [B, N, C] or [B, C, H, W], with a linear layer on their mean over
    positions.
    """

    def __init__(self, features: nn.Module, channels: int, classes: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(channels, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.pretrained_cfg = features.pretrained_cfg
        self.num_prefix_tokens = getattr(features, "num_prefix_tokens", 0)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, for the names that modules have here."""
        matcher = self.features.group_matcher(coarse=coarse) if hasattr(self.features, "group_matcher") else {}
        blocks = matcher.get("blocks", [])
        blocks = [(blocks, None)] if isinstance(blocks, str) else blocks
        return {"blocks": [(pattern.replace("^", r"^features\.", 1), fixed) for pattern, fixed in blocks]}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pooled(self.features(images)))


def pooled(x: Tensor) -> Tensor:
    """The mean of features over positions, [B, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x
