from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class MissSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 64}, help=FIELDS_HELP)


class Miss(Peft):
    """MiSS (arXiv 2409.15371): one small matrix that all shards of the input of a layer share, through peft

    Rank 64 (peft's default), zero at the start. No setting is published for image classification: position and learning
    rate are those of LoRA here.
    """

    Settings = MissSettings
    tuner = "miss"


STRUCTURE = Miss
