from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class DoraSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 8, "lora_alpha": 8, "use_dora": True}, help=FIELDS_HELP)


class Dora(Peft):
    """DoRA (arXiv 2402.09353): LoRA of the direction of each row of the weight, and its length, through peft

    At the start the lengths are those of the weight, B is zero. There is no published setting for image classification:
    position, rank and learning rate are those of LoRA here, so that the two compare.
    """

    Settings = DoraSettings
    tuner = "lora"


STRUCTURE = Dora
