"""The feature that a backbone's classifier reads, for structures that change it or add to it."""

from __future__ import annotations

from torch import nn

from s2a_cli.backbones import Backbone


def only_head(backbone: Backbone) -> nn.Module | None:
    """Returns the classifier, a linear layer or 1 x 1 convolution; None where there are several."""
    layers = list(backbone.head.layers.values())
    return layers[0] if len(layers) == 1 else None


def head_width(head: nn.Module) -> int:
    """Returns how many numbers an image it reads."""
    return head.get_parameter("weight").shape[1]
