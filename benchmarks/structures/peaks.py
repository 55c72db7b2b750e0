"""What a structure trains on a backbone, and the predicted peak of a step: 224 px, 64 images, 100 classes, AdamW."""

from __future__ import annotations

from typing import Any

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.training import forecast
from s2a_cli.training.run import attach

CODES = {  # name -> the words of what is kept for the backward pass
    "none": ["quant=none"],
    "exact": ["quant=none", "quant.recompute=block", "quant.chunks=8"],
    "int4": ["quant=int4"],
    "tiny": ["quant=tiny", "quant.chunks=8"],
}


def predicted(backbone: str, words: list[str], codes: str) -> dict[str, Any]:
    """{trainable: parameters without the head, percent: of the pretrained ones, merges: whether plain weights can hold
    it, peak_mib}, or {problem: why there is no figure}.
    """
    try:
        config = compose([f"backbone={backbone}", "dataset=cifar100", "optim.batch_size=64", *words, *CODES[codes]])
        built = backbones.build(config.backbone, 100, meta=True)
        attached = attach(config, built)
        count = built.count()
        return {
            "trainable": int(count["trainable"]),
            "percent": count["percent"],
            "merges": not attached.unmergeable,
            "peak_mib": round(forecast.predict_step(attached, config, 50_000).peak_mib, 2),
        }
    except UserError as error:
        return {"problem": str(error)}
