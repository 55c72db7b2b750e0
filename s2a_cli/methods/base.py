"""What every structure is: a small class that says what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2a_cli.backbones import Backbone
from s2a_cli.config.rules import pattern
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment

BLOCKS = pattern("all or last:K with K of at least 1", r"all|last:0{0,3}[1-9][0-9]{0,3}")


@dataclass
class BlocksSettings:
    """The settings of a structure that adapts some of the blocks."""

    blocks: str = setting(
        "all",
        help="all | last:K: the blocks that are adapted; below them nothing is kept for backward",
        rule=BLOCKS,
    )


@dataclass
class NoSettings:
    """The settings of a structure without any."""


class Structure:
    """Says which parameters of a backbone are trained, and which modules are added to it.

    A structure's file defines one subclass, and `STRUCTURE = Subclass`; the first line of its docstring stands in
    `s2a ls`. `Settings` is a dataclass of its settings; `conf/method/<name>.yaml` has its name and learning rate.
    adapts: whether the backbone then computes something else, or a gradient passes through it.
    keeps_codable: whether anything is kept for the backward pass that codes of activations can stand for.
    """

    Settings: type = NoSettings
    adapts = True
    keeps_codable = True

    def __init__(self, settings: Any):
        self.settings = settings

    def attach(self, backbone: Backbone, beside: Sequence[Attachment] = ()) -> Attachment:
        """Unfreezes parameters of `backbone` and adds modules to it, in place.

        At the call every parameter is frozen but the head's, and those of the structures `beside` this one. Afterwards
        the function computed is still the pretrained one. In training the model may return several logits,
        [heads, B, classes] instead of [B, classes]: each gets a loss of its own.
        Raises UserError for settings that do not fit this backbone.
        """
        raise TypeError(f"{type(self).__name__} does not say what it attaches")
