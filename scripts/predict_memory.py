"""The README's table of predicted memory: a step of 64 images in fp32 with AdamW; no weights, no data, no GPU.

    .venv/bin/python scripts/predict_memory.py vit_b swin_b resnet50
"""

from __future__ import annotations

import sys

from s2a_cli import backbones
from s2a_cli.compose import compose
from s2a_cli.memory import Memory
from s2a_cli.methods import METHODS
from s2a_cli.training import predict_step

COLUMNS = [("full", "none"), ("bias", "none"), ("bias", "int4"), ("s2a", "int4"), ("side", "none")]


def predicted(backbone: str, method: str, quant: str) -> Memory:
    config = compose([f"backbone={backbone}", f"method={method}", f"quant={quant}", "optim.batch_size=64"])
    made = backbones.build(config.backbone, 100, meta=True)
    METHODS[method](config.method).attach(made)
    return predict_step(made, config, config.optim.batch_size)


if __name__ == "__main__":
    print("| peak MiB (kept for backward) | " + " | ".join(f"{m}, {q}" for m, q in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in sys.argv[1:] or ["vit_b", "swin_b", "resnet50"]:
        row = [predicted(name, *column) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(f"{m.peak_mib:,.0f} ({m.kept_mib:,.0f})" for m in row) + " |", flush=True)
