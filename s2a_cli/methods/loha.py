from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.base import FAMILIES
from s2a_cli.methods.peft import FIELDS_HELP, TARGET, TARGET_HELP, Peft, TunerSettings


@dataclass
class LohaSettings(TunerSettings):
    target: str = setting("all", help=TARGET_HELP, rule=TARGET)
    peft: dict[str, Any] = setting({"r": 8, "alpha": 8}, help=FIELDS_HELP)


class Loha(Peft):
    """LoHa (FedPara, arXiv 2108.06098): the product, element by element, of two low-rank matrices, through peft

    At every layer and convolution of the blocks, depthwise ones too, rank and alpha 8 (peft's defaults, as LyCORIS has
    them, arXiv 2309.14859); zero at the start. Learning rate: peft's for LoKr in its comparison of image models.
    """

    Settings = LohaSettings
    tuner = "loha"
    families = tuple(FAMILIES)


STRUCTURE = Loha
