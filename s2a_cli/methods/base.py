"""What every method is: a small class that says what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

if TYPE_CHECKING:
    from s2a_cli.backbones import Backbone
    from s2a_cli.methods.parts.feature_head import Tail


class Method:
    """Says which parameters of a backbone are trained, and which modules are added to it.

    A method's file defines one subclass, and `METHOD = Subclass`; the first line of its docstring stands in `s2a ls`.
    """

    @dataclass
    class Config:
        name: str = MISSING  # the name in tables and paths
        lr: float = MISSING  # the default of optim.lr

    @dataclass
    class BlocksConfig(Config):
        blocks: str = "all"  # all | last:K: the blocks that are adapted; below them nothing is kept for backward

    def __init__(self, config: Any):
        self.config = config

    def attach(self, backbone: Backbone) -> None:
        """Unfreezes parameters of `backbone` and adds modules to it, in place.

        At the call every parameter is frozen but the head's. Afterwards the function computed is still the pretrained
        one. In training the model may return several votes, [votes, B, classes] instead of [B, classes]: each gets a
        loss of its own. Raises UserError for settings that do not fit this backbone.
        """
        raise TypeError(f"{type(self).__name__} does not say what it attaches")

    def tail(self, backbone: Backbone) -> Tail | None:
        """The trained part alone, after `attach`, for `dataset.cache=taps`.

        None where a gradient passes through the backbone, or it computes something else than before.
        """
        return None
