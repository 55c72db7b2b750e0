"""Operators that a training step dispatches, and its predicted peak, with the sizes of pieces of CUDA and of a CPU.

    python benchmarks/operators/operators.py

Writes operators.json and .md beside this file. What launches no kernel is not counted. Bias tuning, batch 64, fp32, 224
px; then ViT-B by several methods, a micro-batch of 4 and a whole batch. No GPU is needed, none is used.
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
METHODS = ("linear", "bias", "lora", "side", "s2a")
DEVICES = ("cuda", "cpu")
BATCH, CLASSES = 64, 100
COLUMNS = [(batch, quant) for batch in (4, BATCH) for quant in ("none", "tiny")]  # of the table of methods
OUT = Path(__file__).parent


def counted(backbone: str, quant: str, device: str, method: str = "bias", batch: int = BATCH) -> dict[str, Any]:
    """One row."""
    words = [
        f"backbone={backbone}",
        f"method={method}",
        f"quant={quant}",
        "backbone.pretrained=false",
        f"optim.batch_size={batch}",
    ]
    config = compose([*words, "dataset=cifar100"])
    made = backbones.build(config.backbone, CLASSES, meta=True)
    attached = run.attach(config, made)
    own = chunk_sizes.BY_DEVICE["cuda"]
    chunk_sizes.BY_DEVICE["cuda"] = chunk_sizes.BY_DEVICE[device]  # a prediction is one of CUDA
    try:
        profile = forecast.profile_step(attached, config, batch)
    finally:
        chunk_sizes.BY_DEVICE["cuda"] = own
    found = profile.memory
    return {
        "backbone": backbone,
        "method": method,
        "batch": batch,
        "quant": quant,
        "pieces": device,
        "operators": profile.operators,
        "peak_mib": round(found.peak_mib, 1),
        "kept_mib": round(found.kept_mib, 1),
    }


def of_methods(rows: list[dict[str, Any]]) -> list[str]:
    """A line a method: the operators of a step by batch and quant."""
    heads = ["method", *(f"{batch} images, {quant}" for batch, quant in COLUMNS)]
    by = {(row["method"], row["batch"], row["quant"]): row["operators"] for row in rows}
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    return lines + [f"| {name} | {' | '.join(f'{by[name, *column]:,}' for column in COLUMNS)} |" for name in METHODS]


def markdown(rows: list[dict[str, Any]], methods: list[dict[str, Any]]) -> str:
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
                " dispatched, what launches no kernel apart, and the peak."
            ),
            f"Elements of a piece: {told} (see s2a_cli/activations/chunk_sizes.py).",
            "",
            *lines,
            "",
            (
                "ViT-B by several methods, CUDA's pieces: a micro-batch of 4, where a GPU waits for the launches, and a"
                " whole batch."
            ),
            "",
            *of_methods(methods),
            "",
        ]
    )


def main() -> int:
    todo: list[tuple[Any, ...]] = [(b, q, d) for b in BACKBONES for q in QUANTS for d in DEVICES]
    several = [("vit_b", quant, "cuda", name, batch) for name in METHODS for batch, quant in COLUMNS]
    with Progress("counting", len(todo) + len(several), " steps") as progress:

        def row(case: tuple[Any, ...]) -> dict[str, Any]:
            progress.add(1, row=" ".join(map(str, case)))
            return counted(*case)

        rows, methods = list(map(row, todo)), list(map(row, several))
    found = {"environment": environment("cpu"), "rows": rows, "methods": methods}
    atomic_write(OUT / "operators.json", json.dumps(found, indent=1) + "\n")
    atomic_write(OUT / "operators.md", markdown(rows, methods))
    print(markdown(rows, methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
