from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.settings import setting
from s2a_cli.methods.base import Published
from s2a_cli.methods.peft import FIELDS_HELP, Peft, TunerSettings


@dataclass
class LoraSettings(TunerSettings):
    peft: dict[str, Any] = setting({"r": 8, "lora_alpha": 8}, help=FIELDS_HELP)


class Lora(Peft):
    """LoRA (arXiv 2106.09685): W + B A of rank 8 at q, k and v, through peft

    Position, rank, scale and learning rate are NOAH's on VTAB-1k (arXiv 2206.04673, model/module/qkv_super_prompt.py):
    one A [8, channels] and one B [3 * channels, 8] at the fused layer of q, k and v, alpha = rank. A is Kaiming
    uniform, B zero. With another `r`, lora_alpha stays 8 unless it is given, too. QLoRA is `backbone.weights=nf4`,
    rsLoRA and PiSSA are `method.peft={use_rslora: true}` and `{init_lora_weights: pissa_niter_16}`.
    """

    Settings = LoraSettings
    tuner = "lora"
    published = Published(0.29, "NOAH (arXiv 2206.04673), table 1")


STRUCTURE = Lora
