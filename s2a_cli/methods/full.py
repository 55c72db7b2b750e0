from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class Full(Structure):
    """full fine-tuning: every parameter of the adapted blocks (all by default), and their BatchNorms' statistics"""

    Settings = BlocksSettings

    def attach(self, backbone, beside=()):
        backbone.unfreeze(self.settings.blocks)
        return Attachment(backbone)


STRUCTURE = Full
