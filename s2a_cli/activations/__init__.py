"""What is remembered between the forward and the backward pass.

    with remember(config):
        loss = criterion(model(images), labels)
    loss.backward()

Forward values are exactly those of stock PyTorch; for the backward pass operators keep low-bit codes of what their
derivative needs (S2A, arXiv 2503.08154: "4-bit quantization of activations based on their derivatives").
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from s2a_cli.activations.mode import ActivationMode
from s2a_cli.config import QuantConfig

FAMILIES = ("pointwise", "norm", "attention", "softmax", "linear")


def remember(config: QuantConfig) -> AbstractContextManager:
    """The context for a forward pass; with every bit-width null it changes nothing at all."""
    if all(getattr(config, family) is None for family in FAMILIES):
        return nullcontext()
    return ActivationMode(config)


__all__ = ["ActivationMode", "remember"]
