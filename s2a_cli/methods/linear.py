from __future__ import annotations

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import Structure
from s2a_cli.methods.parts.feature_head import FeatureHead


class Linear(Structure):
    """linear probe: the classification head alone"""

    adapts = False
    keeps_features = True
    keeps_codable = False

    def attach(self, backbone, beside=()):
        return Attachment(backbone, adapts=False, feature_head=FeatureHead(backbone.head))  # the head is always trained


STRUCTURE = Linear
