"""The feature that a backbone's classifier reads, for structures that change it or add to it."""

from __future__ import annotations

from torch import nn

from s2a_cli.backbones import Backbone
from s2a_cli.common.errors import UserError


def head_alone() -> UserError:
    """Returns the error of a head that is called before the blocks whose hidden states add to what it reads."""
    return UserError("method: the head reads what is made of the blocks beside it: call the model, not its head")


def only_head(method: str, backbone: Backbone) -> nn.Module:
    """Returns the classifier, a linear layer or 1 x 1 convolution. Raises UserError, for a method, for several."""
    layers = list(backbone.head.layers.values())
    if len(layers) != 1:
        raise UserError(f"method={method}: {type(backbone.model).__name__} has several heads, or none")
    return layers[0]


def head_width(backbone: Backbone) -> int:
    """Returns how many numbers an image a layer of the head reads."""
    return next(iter(backbone.head.layers.values())).get_parameter("weight").shape[1]
