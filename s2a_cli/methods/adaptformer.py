from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck
from s2a_cli.methods.parts.branch_adapter import adapt_branches


@dataclass
class AdaptFormerSettings(BlocksSettings):
    dim: int = setting(
        8, help="numbers between the two linear layers; 8 in tables of VTAB, 64 in the paper", rule=AT_LEAST_1
    )
    scale: float = setting(0.1, help="factor of what is added", rule=POSITIVE)
    dropout: float = setting(0.1, help="share of the numbers in between that is dropped in training", rule=BELOW_1)


class AdaptFormer(Structure):
    """AdaptFormer (arXiv 2205.13535): h + mlp(norm(h)) + s up(relu(down(h))), beside the MLP and its norm

    Source: section 3.2 of the paper; ShoufaChen/AdaptFormer, models/adapter.py and models/custom_modules.py, with
    dim 64 and s = 0.1. `down` is Kaiming-uniform as a linear layer is by default, `up` and the biases are 0. The tables
    of VTAB-1k have dim 8. What is added is not dropped with a dropped path of the MLP, as there.
    """

    Settings = AdaptFormerSettings
    families = ("vit", "swin")
    published = Published(0.16, "V-PETL Bench, README: benchmark results on VTAB")

    def attach(self, backbone, beside=()):
        """Adds an adapter beside the MLP of every adapted block."""
        adapt_branches(self, backbone, self.adapter, reads="state", kinds=("mlp",))
        return Attachment(backbone, unmergeable="an adapter has a nonlinearity: no weight of the backbone can hold it")

    def adapter(self, block: Block) -> Bottleneck:
        """Returns one adapter."""
        middle = nn.Sequential(nn.ReLU(), nn.Dropout(self.settings.dropout))
        made = Bottleneck(block.input.channels, self.settings.dim, middle, self.settings.scale)
        nn.init.kaiming_uniform_(made.down.weight, a=math.sqrt(5))
        nn.init.zeros_(made.up.weight)
        return made


STRUCTURE = AdaptFormer
