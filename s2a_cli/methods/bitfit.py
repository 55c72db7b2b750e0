from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure


class BitFit(Structure):
    """BitFit (arXiv 2106.10199) as vision studies run it: every parameter with "bias" in its name

    Source: KMnP/vpt, src/models/vit_models.py, transfer type tinytl-bias; OSU-MLB/ViT_PEFT_Vision, `bitfit`. On ViT it
    is `method=bias`. It is more where a bias is no vector: tables of relative position biases (Swin, BEiT) and the
    networks that compute such biases, whose gradient needs the attention weights.
    Departures: none; theirs runs the encoder in evaluation mode, ours keeps the dropped paths that a user asks for.
    """

    Settings = BlocksSettings
    published = Published(0.102912, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, bitfit")

    def attach(self, backbone, beside=()):
        backbone.unfreeze(self.settings.blocks, lambda name, module: "bias" in name)
        return Attachment(backbone)


STRUCTURE = BitFit
