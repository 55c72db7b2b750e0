from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.base import Published
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class VeraSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 256}, help=FIELDS_HELP)


class Vera(Peft):
    """VeRA (arXiv 2310.11454): frozen random A and B shared by all layers, scaled by a vector each, through peft

    Rank 256 as published for ViT-B; d is 0.1 at the start, b zero; A and B are made anew from `projection_prng_key`.
    Learning rate: RandLoRA's for VeRA on vision (arXiv 2502.00987, vision_language/train.sh). Departure: q, k and v are
    one layer in most backbones, so that k is adapted as well.
    """

    Settings = VeraSettings
    tuner = "vera"
    published = Published(
        0.0246,
        "VeRA (arXiv 2310.11454), image classification with ViT-B",
        difference="q and v have two vectors each there: 24 * (768 + 256); the fused q, k, v has 12 * (2304 + 256)",
    )


STRUCTURE = Vera
