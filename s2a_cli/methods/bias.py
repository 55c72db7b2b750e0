from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class Bias(Structure):
    """bias tuning (BitFit, arXiv 2106.10199): every bias vector; its gradient needs no activation"""

    Settings = BlocksSettings

    def attach(self, backbone, beside=()):
        """Unfreezes every bias vector of the adapted blocks: of Linear, Conv and normalisation layers alike."""
        # EVA and BEiT keep q_bias and v_bias as vectors of their own
        backbone.unfreeze(self.settings.blocks, lambda name, module: f".{name}".endswith((".bias", "_bias")))
        return Attachment(backbone)


STRUCTURE = Bias
