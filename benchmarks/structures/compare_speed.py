"""Images a second of every contender in OUT/results.json of compare_structures.py, side by side in one process:

    .venv/bin/python benchmarks/structures/compare_speed.py OUT [rounds=20]

Steps of ViT-Ti/16 at 112 px, 16 images, random weights, without codes, on one thread of the CPU: one step of each
contender a round, in a new random order each, after one that is not counted. Written into results.json: the median, and
the median ratio to full fine-tuning's step of the same round. The table is then made anew.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from compare_report import RESULTS, load, report

import s2a_cli.methods  # noqa: F401 (its structures declare their settings)
from s2a_cli import backbones
from s2a_cli.common import files
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.training.run import attach
from s2a_cli.training.step import Step, make_optimizer, train_mode

BATCH, CLASSES = 16, 10
REFERENCE = "full"


def step_of(words: list[str]) -> Callable[[], float]:
    """A step of a contender, which returns its seconds."""
    size = ["backbone=vit_t", "backbone.image_size=112", "backbone.pretrained=false", "device=cpu"]
    config = compose([*size, "dataset=cifar10", *words, "quant=none", f"optim.batch_size={BATCH}"])
    attached = attach(config, backbones.build(config.backbone, CLASSES))
    train_mode(attached.model)
    optimizer = make_optimizer(config.optim, attached.model, attached)
    step = Step(config, torch.device("cpu"), attached)
    images, targets = torch.randn(BATCH, 3, 112, 112), torch.randint(CLASSES, (BATCH,))

    def run() -> float:
        began = time.perf_counter()
        step(attached.model, optimizer, images, targets)
        return time.perf_counter() - began

    return run


def main() -> None:
    out = Path(sys.argv[1])
    rounds = int(sys.argv[2].removeprefix("rounds=")) if len(sys.argv) > 2 else 20
    torch.set_num_threads(1)
    entries = load(out)
    steps = {name: step_of(entry["words"]) for name, entry in entries.items()}
    steps.setdefault(REFERENCE, step_of([f"method={REFERENCE}"]))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with Progress("speed", (rounds + 1) * len(steps), " steps") as progress:
        for _ in range(rounds + 1):
            for name in random.sample(list(steps), len(steps)):
                seconds[name].append(steps[name]())
                progress.add(1)
    counted = {name: times[1:] for name, times in seconds.items()}
    for name, entry in entries.items():
        ratios = [whole / own for own, whole in zip(counted[name], counted[REFERENCE], strict=True)]
        entry["images_per_second"], entry["speed_ratio"] = BATCH / median(counted[name]), median(ratios)
    files.atomic_write(out / RESULTS, json.dumps(entries, indent=1) + "\n")
    report(entries, out, "vit_b")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
