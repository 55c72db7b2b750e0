from __future__ import annotations

from dataclasses import dataclass

from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import Structure


@dataclass
class PartialSettings:
    k: int = setting(1, help="of the last blocks that are trained", rule=AT_LEAST_1)


class Partial(Structure):
    """partial-k (VPT, arXiv 2203.12119, section 4): every parameter of the last k blocks, and the final norm

    Source: KMnP/vpt, src/models/vit_models.py, transfer types partial-1, -2 and -4. On ViT that is blocks.L-k on, and
    the norm before the head: `method=full method.blocks=last:K`.
    Departures: whatever lies between the last k blocks and the head trains too, a patch merging of Swin and the last
    convolution of MobileNets among it; a block of ResNet is one residual block, where theirs is a whole stage; the
    BatchNorms that train use the batch's statistics, theirs stay in evaluation mode. Theirs runs SGD.
    """

    Settings = PartialSettings

    def attach(self, backbone, beside=()):
        backbone.unfreeze(f"last:{self.settings.k}")
        return Attachment(backbone)


STRUCTURE = Partial
