from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class Bias(Structure):
    """bias tuning (BitFit, arXiv 2106.10199): every bias vector; its gradient needs no activation"""

    Settings = BlocksSettings

    def attach(self, backbone, beside=()):
        """Unfreezes every bias vector of the adapted blocks: of Linear, Conv and normalisation layers alike."""
        for _, module in backbone.adapted_modules(self.settings.blocks):
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" or name.endswith(
                    "_bias"
                ):  # EVA and BEiT keep q_bias and v_bias as vectors of their own
                    parameter.requires_grad_(True)
        return Attachment(backbone)


STRUCTURE = Bias
