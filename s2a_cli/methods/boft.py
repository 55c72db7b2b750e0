from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class BoftSettings(TunerSettings):
    peft: dict[str, Any] = setting({"boft_block_size": 4, "boft_n_butterfly_factor": 4}, help=FIELDS_HELP)


class Boft(Peft):
    """BOFT (arXiv 2311.06243): rotates the input of q, k and v by a product of butterfly factors, through peft

    Four factors of blocks of 4 channels, BOFT(m=4, b=4) of the paper, and a scale of each output; the identity at the
    start. Learning rate: that of LoRA here. peft compiles a CUDA extension for this at its first use, and without one
    silently takes a single factor, which is OFT; here PyTorch's own operators take the extension's place.
    """

    Settings = BoftSettings
    tuner = "boft"


STRUCTURE = Boft
