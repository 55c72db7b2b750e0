"""Predicted peaks beside published ones, under the settings that the sources state.

    python benchmarks/published/memory_published.py PUBLISHED.csv > benchmarks/published/memory_published.md

PUBLISHED.csv has the columns source, backbone, method, metric, value, unit. Nothing is trained or downloaded.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tiers"))
from row_list import checkpoint, lora

from s2a_cli import memory, methods
from s2a_cli.backbones import Backbone, build
from s2a_cli.config.compose import compose
from s2a_cli.memory.result import MIB
from s2a_cli.training.step import Step, make_optimizer, train_mode

UNITS = {"GB": 1024.0, "MB": 1.0, "MiB": 1.0}  # in MiB, read as powers of 1024; see the notes in the results


@dataclass(frozen=True)
class Case:
    """A published row and what it is predicted with."""

    source: str  # how the source's name begins
    backbone: str
    method: str
    words: tuple[str, ...]
    change: Callable[[Backbone], None] | None = None
    classes: int = 100


def unfused(backbone: Backbone) -> None:
    module: Any
    for module in backbone.model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False


def both(*changes: Callable[[Backbone], None]) -> Callable[[Backbone], None]:
    def change(backbone: Backbone) -> None:
        for one in changes:
            one(backbone)

    return change


def adaptformer(backbone: Backbone, width: int = 8) -> None:
    """A ReLU bottleneck beside each MLP (arXiv 2205.13535)."""
    block: Any
    for block in backbone.block_modules:
        channels = block.mlp.fc1.in_features
        block.mlp.beside = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels)).to(
            block.mlp.fc1.weight.device
        )
        block.mlp.register_forward_hook(lambda module, args, out: out + module.beside(args[0]) * 0.1)


def ssf(backbone: Backbone) -> None:
    """A scale and a shift behind each operator of a block (arXiv 2210.08823)."""

    def add(module: Any, width: int) -> None:
        device = module.weight.device
        module.register_parameter("scale", nn.Parameter(torch.ones(width, device=device)))
        module.register_parameter("shift", nn.Parameter(torch.zeros(width, device=device)))
        module.register_forward_hook(lambda module, args, out: out * module.scale + module.shift)

    block: Any
    for block in backbone.block_modules:
        for module in (block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2):
            add(module, getattr(module, "out_features", module.weight.shape[0]))


DTL = ("backbone=vit_b", "precision=amp-fp16", "optim.batch_size=32")
LOW = ("backbone=vit_b", "precision=amp-fp16", "optim.batch_size=64")
FULL, BIAS, LINEAR = ("method=full", "quant=none"), ("method=bias", "quant=none"), ("method=linear", "quant=none")


def mesa(short: str, name: str) -> list[Case]:
    """In both precisions: the source does not say which."""
    words = ("backbone=timm", f"backbone.name={name}", "optim.batch_size=128", *FULL)
    return [
        Case("Mesa", short, "full", (*words, f"precision={precision}"), unfused, 1000)
        for precision in ("fp32", "amp-fp16")
    ]


CASES = (
    Case("DTL", "vit_b16_in21k", "full", (*DTL, *FULL), unfused),
    Case("DTL", "vit_b16_in21k", "bitfit", (*DTL, *BIAS), unfused),
    Case("DTL", "vit_b16_in21k", "lora", (*DTL, *LINEAR), both(lora, unfused)),
    Case("DTL", "vit_b16_in21k", "adaptformer", (*DTL, *LINEAR), both(adaptformer, unfused)),
    Case("DTL", "vit_b16_in21k", "ssf", (*DTL, *LINEAR), both(ssf, unfused)),
    Case("Approx-BP", "vit_b16_in21k", "lora", (*LOW, *LINEAR), lora),
    Case("Approx-BP", "vit_b16_in21k", "lora+checkpoint", (*LOW, *LINEAR), both(lora, checkpoint)),
    *mesa("deit_t", "deit_tiny_patch16_224"),
    *mesa("deit_s", "deit_small_patch16_224"),
    *mesa("deit_b", "deit_base_patch16_224"),
    *mesa("swin_t", "swin_tiny_patch4_window7_224"),
)


def predicted(case: Case, *more: str) -> memory.Profile:
    config = compose([*case.words, "dataset=cifar100", *more])
    backbone = build(config.backbone, case.classes, meta=True)
    attached = methods.attach(config.method, backbone)
    if case.change:
        with torch.device("meta"):
            case.change(backbone)
    train_mode(backbone.model)
    count, size = config.optim.batch_size, backbone.image.size
    batch = torch.empty(count, 3, size, size), torch.empty(count, dtype=torch.long)
    blocks = {block.name: block.module for block in backbone.blocks}
    step = Step(config, torch.device("cpu"), attached)
    return memory.profile(backbone.model, batch, step, partial(make_optimizer, config.optim, attached=attached), blocks)


def main(path: str) -> None:
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "peak_memory"]
    print(
        "| source | backbone | method | precision | published | predicted peak | predicted / published | kept | between"
        " steps | simulated reserve |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        row = next(
            r
            for r in rows
            if r["source"].startswith(case.source) and (r["backbone"], r["method"]) == (case.backbone, case.method)
        )
        published, found = float(row["value"]) * UNITS[row["unit"]], predicted(case)
        memory, taken = found.memory, found.reserved_bytes() / MIB
        source = row["source"].partition(",")[0].partition(" (")[0]
        precision = next(word for word in case.words if word.startswith("precision=")).partition("=")[2]
        figures = [published, memory.peak_mib, memory.peak_mib / published, memory.kept_mib, memory.static_mib, taken]
        texts = [f"{value:.2f}" if place == 2 else f"{value:,.0f}" for place, value in enumerate(figures)]
        print("|", " | ".join([source, case.backbone, case.method, precision, *texts]), "|", flush=True)
    print(
        f"\nMiB. torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}; predicted, no device was asked."
    )


if __name__ == "__main__":
    main(sys.argv[1])
