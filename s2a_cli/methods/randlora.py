from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class RandloraSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 6}, help=FIELDS_HELP)


class Randlora(Peft):
    """RandLoRA (arXiv 2502.00987): a full-rank sum of frozen random factors with trained scales, through peft

    Rank 6 of each factor as in the authors' vision_language/train.sh for ViT-B/32, and its learning rate. The factors
    are made anew from `projection_prng_key`. Departure: at q, k and v alone, as LoRA here.
    """

    Settings = RandloraSettings
    tuner = "randlora"


STRUCTURE = Randlora
