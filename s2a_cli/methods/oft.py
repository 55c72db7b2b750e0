from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class OftSettings(TunerSettings):
    peft: dict[str, Any] = setting({"oft_block_size": 32}, help=FIELDS_HELP)


class Oft(Peft):
    """OFT (arXiv 2306.07280): rotates the input of q, k and v in blocks of 32 channels, through peft

    W R for a block-diagonal orthogonal R by Cayley's transform, the identity at the start; peft's block size, and its
    Neumann series for the inverse (OFTv2, arXiv 2506.19847). No setting is published for ViT-B: position and learning
    rate are those of LoRA here. Blocks are smaller by themselves where channels are no multiple of 32.
    """

    Settings = OftSettings
    tuner = "oft"


STRUCTURE = Oft
