from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.base import FAMILIES
from s2a_cli.methods.peft import FIELDS_HELP, TARGET, TARGET_HELP, Peft, TunerSettings


@dataclass
class LokrSettings(TunerSettings):
    target: str = setting("all", help=TARGET_HELP, rule=TARGET)
    peft: dict[str, Any] = setting({"r": 8, "alpha": 8}, help=FIELDS_HELP)


class Lokr(Peft):
    """LoKr (KronA, arXiv 2212.10650): the Kronecker product of two small matrices, through peft

    At every layer and convolution of the blocks, depthwise ones too, rank and alpha 8 (peft's defaults, as LyCORIS has
    them, arXiv 2309.14859); zero at the start. Learning rate: peft's in its comparison of image models.
    """

    Settings = LokrSettings
    tuner = "lokr"
    families = tuple(FAMILIES)


STRUCTURE = Lokr
