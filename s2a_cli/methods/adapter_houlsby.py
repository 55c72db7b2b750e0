from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck
from s2a_cli.methods.parts.branch_adapter import adapt_branches


@dataclass
class HoulsbySettings(BlocksSettings):
    dim: int = setting(8, help="numbers between the two linear layers of an adapter", rule=AT_LEAST_1)


class HoulsbyAdapter(Structure):
    """Houlsby adapters (arXiv 1902.00751): e + up(gelu(down(e))) after attention and after the MLP, in the residual

    e is what the branch would add to its hidden state. Source: section 2.1 of the paper; dim 8, GELU and the place as
    in vision, from visinf/adapter_plus, conf/experiment/ablations/other_configs/houlsby_dim8.yaml. Both weights are
    drawn from N(0, 0.01) cut off at two standard deviations, biases 0: close to the pretrained function, not at it.
    Departures: the norms of the backbone stay frozen, where the paper and that file train them (name a structure that
    trains them beside this one); no dropped path in the adapter.
    """

    Settings = HoulsbySettings
    starts_pretrained = False
    families = ("vit", "swin")

    def attach(self, backbone, beside=()):
        """Adds an adapter at the end of every branch of the adapted blocks."""
        adapt_branches(self, backbone, self.adapter, reads="added")
        return Attachment(backbone, unmergeable="an adapter has a nonlinearity: no weight of the backbone can hold it")

    def adapter(self, block: Block) -> Bottleneck:
        """Returns one adapter."""
        made = Bottleneck(block.input.channels, self.settings.dim, nn.GELU())
        for layer in (made.down, made.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        return made


STRUCTURE = HoulsbyAdapter
