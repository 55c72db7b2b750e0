"""Finds the residual branches of transformer blocks: h + end(layer(norm(h))), once for attention and once for the MLP.

They are found by what runs, not by names, so that structures which adapt attention or the MLP ask no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from s2a_cli.backbones.trace import ModuleTrace


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    kind: attention or mlp. norm: reads the hidden state h. layer: reads what `norm` returns. end: the last module of
    the branch (a layer scale, a dropped path, or `layer` itself); what it returns is added to h. linears: (name,
    module) of the linear layers and convolutions within `layer`, in the order in which they run.
    """

    kind: str
    norm: nn.Module
    layer: nn.Module
    end: nn.Module
    linears: tuple[tuple[str, nn.Module], ...]


def find_branches(block: ModuleTrace) -> tuple[Branch, ...]:
    """Returns the branches of a block in order; none where it is no sequence of pre-normalised residual branches."""
    groups: list[list[ModuleTrace]] = []  # of modules that run one after another, each begun by a normalisation
    for found in block.within:
        if found.normalises or not groups:
            groups.append([])
        groups[-1].append(found)
    branches = [branch for group in groups if (branch := _branch(group))]
    whole = len(branches) == len(groups) and {branch.kind for branch in branches} == {"attention", "mlp"}
    return tuple(branches) if whole else ()


def _branch(group: list[ModuleTrace]) -> Branch | None:
    """Returns the branch of these modules, which run one after another; None where they are not one."""
    layers = [found for found in group if found.layers]
    if len(layers) != 1 or len(group) < 2 or not group[0].normalises or group[1] is not layers[0]:
        return None
    if any(found.calls > 1 for found in group):  # as in CaiT, whose dropped path ends both branches
        return None
    layer = layers[0]
    kind = "attention" if layer.attends else "mlp"
    return Branch(kind, group[0].module, layer.module, group[-1].module, linear_layers(layer))


def linear_layers(parent: ModuleTrace) -> tuple[tuple[str, nn.Module], ...]:
    """Returns (name, module) of the linear layers and convolutions that ran within, in order."""
    return tuple((found.name, found.module) for found in parent.descendants() if is_linear(found.module))


def is_norm(module: nn.Module) -> bool:
    """Tells whether a module is one normalisation layer, by the name of its class: timm has many of its own."""
    return "norm" in type(module).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module is one linear layer or convolution."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
