"""Operators that a training step dispatches, and its predicted peak, with the sizes of pieces of CUDA and of a CPU.

    python benchmarks/operators/operators.py

Writes results/operators.json and .md. Views are not counted. Bias tuning, batch 64, fp32, 224 px; no GPU is needed,
none is used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from s2a_cli import backbones
from s2a_cli.activations import chunk_sizes
from s2a_cli.common.files import atomic_write
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.training import forecast, run
from s2a_cli.training.environment import environment

BACKBONES = ("vit_b", "swin_b", "convnext_b", "resnet50")
QUANTS = ("none", "int4", "tiny")
DEVICES = ("cuda", "cpu")
BATCH, CLASSES = 64, 100
MOST = {"int4": 2.0, "tiny": 2.5}  # times stock's operators on CUDA, for ViT-B
OUT = Path(__file__).parent


def counted(backbone: str, quant: str, device: str) -> dict[str, Any]:
    """One row."""
    words = [
        f"backbone={backbone}",
        "method=bias",
        f"quant={quant}",
        "backbone.pretrained=false",
        f"optim.batch_size={BATCH}",
    ]
    config = compose([*words, "dataset=cifar100"])
    made = backbones.build(config.backbone, CLASSES, meta=True)
    attached = run.attach(config, made)
    own = chunk_sizes.BY_DEVICE["cuda"]
    chunk_sizes.BY_DEVICE["cuda"] = chunk_sizes.BY_DEVICE[device]  # a prediction is one of CUDA
    try:
        profile = forecast.profile_step(attached, config, BATCH)
    finally:
        chunk_sizes.BY_DEVICE["cuda"] = own
    found = profile.memory
    return {
        "backbone": backbone,
        "quant": quant,
        "pieces": device,
        "operators": profile.operators,
        "peak_mib": round(found.peak_mib, 1),
        "kept_mib": round(found.kept_mib, 1),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line a backbone and quant: operators and times stock's, peak and kept MiB, for both kinds of pieces."""
    sizes = {device: vars(chunk_sizes.BY_DEVICE[device]) for device in DEVICES}
    head = [
        "backbone",
        "quant",
        "operators, CUDA's pieces",
        "times stock",
        "peak MiB",
        "operators, a CPU's pieces",
        "times stock",
        "peak MiB",
        "kept MiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * (len(head) - 2)]
    by = {(row["backbone"], row["quant"], row["pieces"]): row for row in rows}
    for backbone in BACKBONES:
        stock = by[backbone, "none", "cuda"]["operators"]
        for quant in QUANTS:
            cells = [backbone, quant]
            for device in DEVICES:
                row = by[backbone, quant, device]
                cells += [f"{row['operators']:,}", f"{row['operators'] / stock:.2f}", f"{row['peak_mib']:,.0f}"]
            lines.append("| " + " | ".join([*cells, f"{by[backbone, quant, 'cuda']['kept_mib']:,.0f}"]) + " |")
    told = "; ".join(
        f"{device} {', '.join(f'{name} 2^{size.bit_length() - 1}' for name, size in found.items())}"
        for device, found in sizes.items()
    )
    return "\n".join(
        [
            "# Operators a step",
            "",
            (
                "`python benchmarks/operators/operators.py`. Bias tuning, batch 64, fp32, 224 px, predicted: what is"
                " dispatched, views apart, and the peak."
            ),
            f"Elements of a piece: {told} (see s2a_cli/activations/chunk_sizes.py).",
            "",
            *lines,
            "",
        ]
    )


def main() -> int:
    rows, todo = [], [(b, q, d) for b in BACKBONES for q in QUANTS for d in DEVICES]
    with Progress("counting", len(todo), " steps") as progress:
        for case in todo:
            rows.append(counted(*case))
            progress.add(1, row=" ".join(case))
    atomic_write(OUT / "operators.json", json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n")
    atomic_write(OUT / "operators.md", markdown(rows))
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
