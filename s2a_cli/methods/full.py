from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class Full(Structure):
    """full fine-tuning: all parameters of the adapted blocks (all by default), statistics of BatchNorms with weights"""

    Settings = BlocksSettings

    def attach(self, backbone, beside=()):
        backbone.unfreeze(self.settings.blocks)
        return Attachment(backbone)


STRUCTURE = Full
