from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from s2a_cli.backbones.branches import Branch
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.branch_adapter import adapted_branches


@dataclass
class RepAdapterSettings(BlocksSettings):
    dim: int = setting(8, help="numbers between the two linear layers of an adapter", rule=AT_LEAST_1)
    groups: int = setting(
        2, help="groups of the second linear layer; they divide dim and the channels", rule=AT_LEAST_1
    )
    scale: float = setting(1.0, help="factor of what is added; 0.1 to 10, by task, in the source", rule=POSITIVE)
    dropout: float = setting(0.1, help="share of the numbers in between that is dropped in training", rule=BELOW_1)


class LinearAdapter(nn.Module):
    """x + s up(dropout(down(x))) for the input x [..., C] of a linear layer, without a nonlinearity.

    up has g groups: each `dim` / g of the numbers make C / g channels. `down` is Xavier-uniform, `up` and the biases
    are 0. Where the layer has no bias, neither have these.
    """

    def __init__(self, layer: nn.Linear, settings: RepAdapterSettings):
        super().__init__()
        channels, dim, groups = layer.in_features, settings.dim, settings.groups
        biases = layer.bias is not None
        self.scale, self.dropout = settings.scale, nn.Dropout(settings.dropout)
        self.down = nn.Linear(channels, dim, biases)
        self.up = nn.ModuleList(nn.Linear(dim // groups, channels // groups, biases) for _ in range(groups))
        nn.init.xavier_uniform_(self.down.weight)
        for name, parameter in self.named_parameters():
            if name != "down.weight":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        few = self.dropout(self.down(x)).chunk(len(self.up), dim=-1)
        added = torch.cat([up(part) for up, part in zip(self.up, few)], dim=-1)
        return x + (added * self.scale).to(x.dtype)

    def on_input(self, layer: nn.Module, args: tuple) -> tuple:
        """Adapts what the layer reads. A forward pre-hook of the layer."""
        return self(args[0]), *args[1:]

    def merge_into(self, layer: nn.Linear) -> None:
        """Makes W (x + s (B (A x + a) + b)) + c the layer: its weight W + s W B A, its bias c + s W (B a + b)."""
        ups = [cast(nn.Linear, up) for up in self.up]
        scaled = self.scale * layer.weight @ torch.block_diag(*[up.weight for up in ups])
        if layer.bias is not None:
            layer.bias += scaled @ self.down.bias + self.scale * layer.weight @ torch.cat([up.bias for up in ups])
        layer.weight += scaled @ self.down.weight


class RepAdapter(Structure):
    """RepAdapter (arXiv 2302.08106): x + s up(down(x)) before q, k, v and before the MLP; merges into their weights

    Source: section 3.2 of the paper; luogen1996/RepAdapter, repadapter.py (repblock, dim 8, 2 groups, dropout 0.1).
    Departure: the adapter reads what the first linear layer reads, rather than what the norm returns. That is the same
    but for the zeros with which Swin fills a window, and there only this place merges exactly.
    """

    Settings = RepAdapterSettings
    families = ("vit", "swin")
    published = Published(
        0.22, "V-PETL Bench, README: benchmark results on VTAB", difference="the source counts the weights alone"
    )

    def attach(self, backbone, beside=()):
        """Adds an adapter before the first linear layer of both branches of every adapted block."""
        settings: RepAdapterSettings = self.settings
        layers = [self.first_layer(backbone, branch) for _, branch in adapted_branches(self, backbone)]
        channels = sorted({layer.in_features for layer in layers})
        if any(number % settings.groups for number in (settings.dim, *channels)):
            raise UserError(
                f"groups={settings.groups} of the RepAdapter does not divide dim={settings.dim} and the channels of"
                f" each block: {listed(channels)}"
            )
        adapters = [LinearAdapter(layer, settings) for layer in layers]
        for layer, adapter in zip(layers, adapters):
            layer.register_forward_pre_hook(adapter.on_input)
        backbone.add(self.name, nn.ModuleList(adapters))
        merges = [(layer, functools.partial(adapter.merge_into, layer)) for layer, adapter in zip(layers, adapters)]
        return Attachment(backbone, merges=tuple(merges))

    def first_layer(self, backbone, branch: Branch) -> nn.Linear:
        """Returns the one linear layer of a branch that reads the normalised hidden state."""
        layers = [module for _, module in branch.linears if isinstance(module, nn.Linear)]
        if len(layers) != 2 or len(branch.linears) != 2:
            raise self.misfit(backbone, f"its {branch.kind} is not one linear layer, what it computes, and another one")
        return layers[0]


STRUCTURE = RepAdapter
