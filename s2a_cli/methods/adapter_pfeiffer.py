from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck, QuickGELU
from s2a_cli.methods.parts.branch_adapter import adapt_branches


@dataclass
class PfeifferSettings(BlocksSettings):
    dim: int = setting(8, help="numbers between the two linear layers of an adapter", rule=AT_LEAST_1)
    dropout: float = setting(0.1, help="share of these numbers that is dropped in training", rule=BELOW_1)


class PfeifferAdapter(Structure):
    """Pfeiffer adapters (arXiv 2005.00247): e + up(quick_gelu(down(e))) after the MLP alone, in the residual

    e is what the MLP's branch would add to its hidden state. Source: section 3.2.1 of the paper for the place; all else
    from what the tables of vision report as "Adapter": NOAH (ZhangYuanhan-AI/NOAH), model/module/adapter_super.py, with
    Xavier-uniform weights in both layers and biases from N(0, 1e-6).
    Departure: the code of VPT (KMnP/vpt, src/models/vit_adapter/adapter_block.py) has GELU, no dropout, and weights of
    0 in both layers. With those nothing but the bias of `up` ever has a gradient.
    """

    Settings = PfeifferSettings
    starts_pretrained = False
    families = ("vit", "swin")
    published = Published(0.16, "V-PETL Bench, README: benchmark results on VTAB")

    def attach(self, backbone, beside=()):
        """Adds an adapter at the end of the MLP's branch of every adapted block."""
        adapt_branches(self, backbone, self.adapter, reads="added", kinds=("mlp",))
        return Attachment(backbone, unmergeable="an adapter has a nonlinearity: no weight of the backbone can hold it")

    def adapter(self, block: Block) -> Bottleneck:
        """Returns one adapter."""
        middle = nn.Sequential(QuickGELU(), nn.Dropout(self.settings.dropout))
        made = Bottleneck(block.input.channels, self.settings.dim, middle)
        for layer in (made.down, made.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        return made


STRUCTURE = PfeifferAdapter
