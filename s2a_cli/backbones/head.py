"""Finds the classifier of a model: the layers whose size is the number of classes, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Head:
    """The classifier of a model. Of several layers, the model adds up or averages what they return."""

    layers: dict[str, nn.Module]  # name -> a linear layer or a 1x1 convolution
    classes: int

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from layer.parameters()

    def holds(self, name: str) -> bool:
        """Tells whether this is the name of one of the layers, or of a tensor of one."""
        return name in self.layers or name.rpartition(".")[0] in self.layers


def find_head(model: nn.Module, other: nn.Module, classes: int) -> Head:
    """Returns the head of a model for `classes` classes; without layers where there is none.

    other: the same model for another number of classes.
    """
    shapes = {name: p.shape for name, p in other.named_parameters()}
    names = [name.rpartition(".")[0] for name, p in model.named_parameters() if shapes.get(name) != p.shape]
    return Head({name: model.get_submodule(name) for name in dict.fromkeys(names)}, classes)


class Classified(nn.Module):
    """Adds a linear layer to a model that returns features [B, C], [B, N, C] or [B, C, H, W].

    The layer reads their mean over positions.
    """

    def __init__(self, features: nn.Module, channels: int, classes: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(channels, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.pretrained_cfg = features.pretrained_cfg
        self.num_prefix_tokens = getattr(features, "num_prefix_tokens", 0)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Returns the group_matcher of timm's model, for the names that modules have here."""
        of_features = getattr(self.features, "group_matcher", None)
        blocks = of_features(coarse=coarse).get("blocks", []) if of_features else []
        blocks = [(blocks, None)] if isinstance(blocks, str) else blocks
        return {"blocks": [(pattern.replace("^", r"^features\.", 1), fixed) for pattern, fixed in blocks]}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pooled(self.features(images)))


def pooled(x: Tensor) -> Tensor:
    """Returns the mean of features [B, C], [B, N, C] or [B, C, H, W] over positions, [B, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x
