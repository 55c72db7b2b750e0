from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class HraSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 8}, help=FIELDS_HELP)


class Hra(Peft):
    """HRA (arXiv 2405.17484): reflects the input of q, k and v 8 times (Householder), through peft

    W H1 ... H8; pairs of equal reflections at the start, which undo each other up to rounding. Rank 8, as published. No
    setting is published for ViT-B: position and learning rate are those of LoRA here.
    """

    Settings = HraSettings
    tuner = "hra"
    starts_pretrained = False  # pairs of reflections undo each other up to rounding


STRUCTURE = Hra
