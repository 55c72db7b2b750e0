from __future__ import annotations

from s2a_cli.methods.base import Method
from s2a_cli.methods.parts.feature_head import Tail


class Linear(Method):
    """linear probe: the classification head alone"""

    Config = Method.Config

    def attach(self, backbone):
        pass  # the head is always trained

    def tail(self, backbone):
        return Tail(backbone.head)


METHOD = Linear
