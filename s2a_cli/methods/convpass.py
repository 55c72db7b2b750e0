from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from s2a_cli.backbones import Block
from s2a_cli.config.rules import one_of
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck, OnMap, QuickGELU
from s2a_cli.methods.parts.branch_adapter import adapt_branches


@dataclass
class ConvpassSettings(BlocksSettings):
    dim: int = setting(8, help="channels of the convolution between the two linear layers", rule=AT_LEAST_1)
    scale: float = setting(1.0, help="factor of what is added; 0.01 to 100, by task, in the source", rule=POSITIVE)
    dropout: float = setting(0.1, help="share of the numbers behind the convolution that is dropped", rule=BELOW_1)
    kernel: str = setting(
        "identity",
        help="identity | xavier: how the convolution starts; by task in the source",
        rule=one_of("identity", "xavier"),
    )


class Convpass(Structure):
    """Convpass (arXiv 2207.07039): a bottleneck with a 3x3 convolution, beside attention and beside the MLP

    h + layer(n) + s up(dropout(q(conv(q(down(n)))))) with n = norm(h) and q = QuickGELU. The convolution runs over the
    map of patches, and over each class or register token as a map of one position. `down` is Xavier-uniform, the
    convolution the identity or Xavier-uniform, `up` and all biases 0.
    Source: section 3.2 of the paper; JieShibo/PETL-ViT, convpass/vtab/convpass.py (forward_block).
    Departure: there the backbone's dropped path drops what is added as well, by draws of its own; here it is kept.
    """

    Settings = ConvpassSettings
    families = ("vit", "swin")
    published = Published(0.33, "arXiv 2207.07039, table of VTAB-1k")

    def attach(self, backbone, beside=()):
        """Adds a convolutional bypass to every branch of the adapted blocks."""
        adapt_branches(self, backbone, self.bypass, reads="normed")
        return Attachment(backbone, unmergeable="a bypass has nonlinearities: no weight of the backbone can hold it")

    def bypass(self, block: Block) -> Bottleneck:
        """Returns one convolutional bypass."""
        settings = self.settings
        convolution = nn.Conv2d(settings.dim, settings.dim, 3, padding=1)
        if settings.kernel == "identity":
            nn.init.dirac_(convolution.weight)
        else:
            nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(cast(Tensor, convolution.bias))
        on_map = OnMap(block.input, convolution)
        middle = nn.Sequential(QuickGELU(), on_map, QuickGELU(), nn.Dropout(settings.dropout))
        made = Bottleneck(block.input.channels, settings.dim, middle, settings.scale)
        nn.init.xavier_uniform_(made.down.weight)
        nn.init.zeros_(made.up.weight)
        return made


STRUCTURE = Convpass
