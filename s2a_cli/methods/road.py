from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class RoadSettings(TunerSettings):
    peft: dict[str, Any] = setting({"variant": "road_1", "group_size": 64}, help=FIELDS_HELP)


class Road(Peft):
    """RoAd (arXiv 2409.00119): rotates and scales pairs of the outputs of q, k and v, through peft

    Variant road_1 in groups of 64 (peft's defaults), the identity at the start. Learning rate: that of peft's
    comparison of image models. Position: that of LoRA here.
    """

    Settings = RoadSettings
    tuner = "road"


STRUCTURE = Road
