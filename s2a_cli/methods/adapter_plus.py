from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck
from s2a_cli.methods.parts.branch_adapter import adapt_branches


@dataclass
class AdapterPlusSettings(BlocksSettings):
    dim: int = setting(8, help="numbers between the two linear layers; 1 to 32, by task, in the paper", rule=AT_LEAST_1)
    drop_path: float = setting(0.1, help="probability that a sample goes past an adapter in training", rule=BELOW_1)


class ScaledAdapter(Bottleneck):
    """drop_path(g * up(gelu(down(x)))) for x [..., C], with a learned factor of each channel, g [C].

    g is multiplied into the weight and the bias of `up`, [C, width] and [C]: a product with its output would keep that.
    Source: Adapter+ (arXiv 2406.06820), section 3.3; visinf/adapter_plus, adapter_plus/vit_adapter.py. Both weights are
    drawn from N(0, 0.01) cut off at two standard deviations; biases 0, g = 1.
    """

    def __init__(self, channels: int, settings: AdapterPlusSettings):
        super().__init__(channels, settings.dim, nn.GELU())
        self.factors = nn.Parameter(torch.ones(channels))
        self.drop_path = DropPath(settings.drop_path)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        few = self.middle(self.down(x))
        return self.drop_path(F.linear(few, self.factors[:, None] * self.up.weight, self.factors * self.up.bias))


class AdapterPlus(Structure):
    """Adapter+ (arXiv 2406.06820): x + g up(gelu(down(x))) after each block, with a learned factor a channel

    x is the block's output. Departures: none in the function. The paper also trains with a dropped path of 0.1 in the
    backbone, which is `backbone.kwargs.drop_path_rate`.
    """

    Settings = AdapterPlusSettings
    starts_pretrained = False
    families = ("vit", "swin")
    published = Published(
        0.16,
        "arXiv 2406.06820, table of VTAB, r = 8: 0.20 with the head, which has 0.04 on average over the tasks",
        difference="it is a difference of two rounded numbers",
    )

    def attach(self, backbone, beside=()):
        """Adds an adapter after the residual sum of the MLP of every adapted block."""
        adapt_branches(self, backbone, self.adapter, reads="sum", kinds=("mlp",))
        return Attachment(backbone, unmergeable="an adapter has a nonlinearity: no weight of the backbone can hold it")

    def adapter(self, block: Block) -> ScaledAdapter:
        """Returns one adapter."""
        return ScaledAdapter(block.input.channels, self.settings)


STRUCTURE = AdapterPlus
