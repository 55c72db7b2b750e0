from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class Full(Structure):
    """full fine-tuning: every parameter of the adapted blocks (all by default), and their BatchNorms' statistics"""

    Settings = BlocksSettings

    def attach(self, backbone, beside=()):
        for _, module in backbone.adapted_modules(self.settings.blocks):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
        return Attachment(backbone)


STRUCTURE = Full
