from __future__ import annotations

from s2a_cli.backbones.branches import is_norm
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure


class LayerNorm(Structure):
    """LayerNorm tuning (as in arXiv 2409.16434): scale and shift of every normalisation

    Source: OSU-MLB/ViT_PEFT_Vision, experiment/build_model.py, `ln`: every parameter with "norm" in its name.
    Departures: normalisations are told by their class, so that those which are called otherwise count too; of other
    kinds than LayerNorm all count, and BatchNorms that train use the batch's statistics.
    """

    Settings = BlocksSettings
    published = Published(0.0384, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, ln")

    def attach(self, backbone, beside=()):
        backbone.unfreeze(self.settings.blocks, lambda name, module: is_norm(module))
        return Attachment(backbone)


STRUCTURE = LayerNorm
