from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2a_cli.config.schema import POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.base import Published
from s2a_cli.methods.peft import FIELDS_HELP, LR_SCALE_HELP, Peft, TunerSettings


@dataclass
class FourierftSettings(TunerSettings):
    peft: dict[str, Any] = setting({"n_frequency": 3000, "scaling": 300.0}, help=FIELDS_HELP)
    lr_scale: float = setting(300.0, help=LR_SCALE_HELP, rule=POSITIVE)


class Fourierft(Peft):
    """FourierFT (arXiv 2405.03003): the Fourier transform of 3000 trained coefficients, through peft

    n = 3000 and a scale of 300 as published for ViT-B; the coefficients' learning rate is 300 times the head's (the
    authors' experiment/ViT/exec.py, which searches the head's below 1e-3). They are N(0, 1) at the start, so that the
    function is not the pretrained one. The update's standard deviation is scale * sqrt(n) / (inputs * outputs):
    narrower backbones need a smaller scale, `method.peft={scaling: 30}` for ViT-Ti. Departure: q, k and v are one layer
    in most backbones, and share the coefficients that q and v have each.
    """

    Settings = FourierftSettings
    tuner = "fourierft"
    starts_pretrained = False
    published = Published(
        0.072,
        "FourierFT (arXiv 2405.03003), image classification with ViT-B, n = 3000",
        difference="q and v have 3000 each there, the fused q, k, v has 3000",
    )


STRUCTURE = Fourierft
