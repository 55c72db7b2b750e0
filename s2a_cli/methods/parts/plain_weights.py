"""Tells whether the weights of layers can hold what a merge adds to each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

from s2a_cli.common.text import listed


def holds_plain_weight(layer: nn.Module) -> bool:
    """Tells whether a layer's weight and bias are tensors of its own, rather than computed from others.

    Parametrizations compute them when they are read; the hooks of weight_norm and pruning before each call.
    """
    own = layer._parameters.keys() | layer._buffers.keys()
    return all(name in own for name in ("weight", "bias") if hasattr(layer, name))


def unmergeable(model: nn.Module, layers: Iterable[nn.Module]) -> str:
    """Returns why these layers of a model can't each hold a change of their own; empty where they can."""
    names, holders = {}, defaultdict[Tensor, list[str]](list)
    for name, module in model.named_modules():
        names[module] = name
        for parameter in module.parameters(recurse=False):
            holders[parameter].append(name)
    for layer in layers:
        if not holds_plain_weight(layer):
            return f"{names[layer]} computes its weight from other tensors, which can't hold what was added to it"
        for parameter in layer.parameters(recurse=False):
            if len(sharing := holders[parameter]) > 1:
                return f"{listed(sharing, 3)} share a weight that would have to hold different changes"
    return ""
