"""What every structure is: a small class that says what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s2a_cli.backbones import Backbone
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
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


FAMILIES = {  # of backbones, as the common tester has one of each -> as an error names them
    "vit": "ViT and its relatives",
    "swin": "Swin",
    "convnext": "ConvNeXt",
    "resnet": "ResNet",
    "mobilenet": "MobileNet and EfficientNet",
}


@dataclass(frozen=True)
class Published:
    """What a source says of a structure's trained parameters on ViT-B/16 (images of 224 px), without the head.

    millions: the number, as many digits as the source gives. source: where it stands. settings: those of the structure
    with which it was counted, where they are not the defaults. difference: why ours differs by more than 2 %.
    """

    millions: float
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    difference: str = ""


class Structure:
    """Says which parameters of a backbone are trained, and which modules are added to it.

    A structure's file defines one subclass, and `STRUCTURE = Subclass`; the first line of its docstring stands in
    `s2a ls`. `Settings` is a dataclass of its settings; `conf/method/<name>.yaml` has its name and learning rate.
    adapts: whether the backbone then computes something else, or a gradient passes through it.
    keeps_features: whether a run can train on kept features of the backbone (dataset.cache=features).
    keeps_codable: whether anything is kept for the backward pass that codes of activations can stand for.
    starts_pretrained: whether the function at the start is that of the backbone.
    replaces_layers: whether it puts layers of its own in the place of the backbone's; such structures are attached
    after those that look for layers by their kind.
    needs: the package that it needs beside those that are always there; an extra of this one has its name.
    families: those of FAMILIES that it fits, and that the common tester holds it to.
    published: what its source says of the number of trained parameters, if anything.
    """

    Settings: type = NoSettings
    adapts = True
    keeps_features = False
    keeps_codable = True
    starts_pretrained = True
    replaces_layers = False
    needs = ""
    families: tuple[str, ...] = tuple(FAMILIES)
    published: Published | None = None

    def __init__(self, settings: Any):
        self.settings = settings

    def attach(self, backbone: Backbone, beside: Sequence[Attachment] = ()) -> Attachment:
        """Unfreezes parameters of `backbone` and adds modules to it, in place.

        At the call every parameter is frozen but the head's, and those of the structures `beside` this one. Afterwards
        the function computed is still the pretrained one, up to a factor of its logits where others that are zero have
        a part in their mean, unless `starts_pretrained` is false. In training the model
        may return several logits, [heads, B, classes] instead of [B, classes]: each gets a loss of its own.
        Raises UserError for settings that do not fit this backbone.
        """
        raise TypeError(f"{type(self).__name__} does not say what it attaches")

    def misfit(self, backbone: Backbone, why: str) -> UserError:
        """Returns what to say where the structure does not fit a backbone: why, and which it fits."""
        kind, fitting = type(backbone.model).__name__, listed([FAMILIES[name] for name in self.families])
        return UserError(f"method={self.name}: does not fit {kind}: {why}; it fits {fitting}")

    @property
    def name(self) -> str:
        """The name of its file, of its config and in every table."""
        return type(self).__module__.rpartition(".")[2]
