"""A frozen Linear or Conv2d whose weight is no parameter, but held in another form and there while the layer runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stored(nn.Module):
    """A layer that holds its weight [out, ...] in a form of its own; a subclass says which."""

    stores_weights = True  # in its buffers, if anywhere
    FORM: tuple[str, ...] = ()  # the attributes in which a subclass holds the weight
    bias: Tensor | None
    like: Tensor

    def take(self, weight: Tensor) -> None:
        """Takes the weight of the plain layer that this was."""
        self.shape = weight.shape
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # Module.to converts and moves it

    @property
    def elements(self) -> int:
        """Returns how many elements the weight has, which is no parameter any more."""
        return self.shape.numel()

    @property
    def weight(self) -> Tensor:
        """Returns the weight, made at each call, for code that asks for its values, dtype or device."""
        raise NotImplementedError

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the output of the plain layer with this weight."""
        return self._conv_forward(x, weight, bias) if isinstance(self, nn.Conv2d) else F.linear(x, weight, bias)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which PyTorch runs a plain layer on x: that of autocast, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
