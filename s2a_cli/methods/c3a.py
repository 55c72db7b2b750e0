from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.schema import POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, LR_SCALE_HELP, Peft, TunerSettings


@dataclass
class C3aSettings(TunerSettings):
    peft: dict[str, Any] = setting({"block_size": 64}, help=FIELDS_HELP)
    lr_scale: float = setting(300.0, help=LR_SCALE_HELP, rule=POSITIVE)


class C3a(Peft):
    """C3A (arXiv 2407.19342): block-circular convolutions of the input of q, k and v, through peft

    Kernels of 64 channels, which divide the widths of most backbones, and their rate of 300 times the head's, for which
    peft's comparison takes 3e-1. The kernels are Xavier uniform at the start, as published, so that the function is not
    the pretrained one; `method.peft={init_weights: true}` begins with zeros.
    """

    Settings = C3aSettings
    tuner = "c3a"
    starts_pretrained = False


STRUCTURE = C3a
