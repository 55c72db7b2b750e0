"""Plans for several budgets beside all that anybody could set by hand, side by side in one run on this device.

    python benchmarks/planner/budgets.py backbone=vit_b batch=64
    python benchmarks/planner/budgets.py backbone=vit_t batch=16 budgets=30MiB,60MiB steps=2 backbone.image_size=112

The rows are stock PyTorch, timm's checkpointing of whole blocks and ours, each in micro-batches of every size, and
the presets. A row counts at a budget where its predicted peak fits. Each row is first timed once. Rows that come near
the fastest that fits at some budget, or near the fastest checkpointing, are then timed together with all plans: one
step each, in an order drawn anew every round, after a micro-batch that is not timed; medians. Every step, and every
plan, is made in a process of its own, as in a run: the heap that other steps left behind makes a CPU's steps slow.
A plan with the settings of a row is that row: timed twice, it would differ from itself by what the machine does
meanwhile. Where micro-batches are small a step is cut to some 16 images: the rest would repeat them.
Wanted: a plan at 0.97 of the best row that fits or more, and 1.15 times as fast as checkpointing wherever that fits.
rows=REGEX takes rows with such names alone, where others are known to be slower. Writes OUT/NAME.json, .md and .png.
OMP_NUM_THREADS sets the CPU's threads. Words that are no options of this command are settings of the runs.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import budgets_steps
import torch
from budgets_report import figure, markdown
from budgets_steps import TIMED, Row

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.memory.result import MIB
from s2a_cli.planner.sizes import size
from s2a_cli.training.environment import environment

BUDGETS = "400MiB,440MiB,500MiB,600MiB,900MiB,1600MiB,3200MiB,6GiB"
PRESETS = ("exact", "int8", "int5", "int4", "tiny")
CHECKPOINTED = "checkpointing"
NEAR = 0.8  # of the images a second of the fastest: below it, a row is timed no further
OPTIONS = {
    "batch": "64",
    "budgets": BUDGETS,
    "steps": "5",
    "rows": ".",
    "fidelity": "exact",
    "out": "benchmarks/planner",
    "name": "",
}


def rows(batch: int) -> list[Row]:
    """Returns all that can be set by hand."""
    sizes = [2**power for power in range(batch.bit_length()) if 2**power < batch] + [batch]
    found = []
    for micro in sizes:
        cut = {"optim.micro_batch": micro} if micro < batch else {}
        said = f"micro-batches of {micro}" if micro < batch else "the whole batch"
        found.append(Row(f"stock, {said}", {"quant": "none"} | cut))
        found.append(Row(f"timm's checkpointing, {said}", {"quant": "none"} | cut, CHECKPOINTED, timm=True))
        recomputed = {"quant": "none", "quant.recompute": "block", "quant.chunks": "null"}
        found.append(Row(f"quant.recompute=block, {said}", recomputed | cut, CHECKPOINTED))
        if micro in (sizes[0], sizes[len(sizes) // 2], batch):
            found += [Row(f"quant={preset}, {said}", {"quant": preset} | cut, "preset") for preset in PRESETS]
    return found


def compare(words: list[str], batch: int, budgets: list[str], steps: int, fidelity: str, names: str) -> dict[str, Any]:
    """Returns the rows, the plan of each budget and how it compares with the best row that fits."""
    known = [row for row in rows(batch) if re.search(names, row.name)]
    plans: dict[str, tuple[Row, dict[str, Any]]] = {}
    sizes = [size("budgets", budget) / MIB for budget in budgets]
    with budgets_steps.processes() as pool:
        about, peaks = pool.submit(budgets_steps.predicted, words, known).result()
        for row, peak in zip(known, peaks, strict=True):
            row.peak_mib = peak
        for budget in budgets:
            try:
                row, made = pool.submit(budgets_steps.planned, [*words, f"fidelity={fidelity}"], budget).result()
            except UserError as error:
                print(f"{budget}: {error}", file=sys.stderr)
                continue
            same = (one for one in [*known, *(one for one, _ in plans.values())] if one.is_same(row, words))
            plans[budget] = next(same, row), made
        planned = list({id(row): row for row, _ in plans.values()}.values())
        fitting = [row for row in known if row.peak_mib <= max(sizes)]
        screened = fitting + [row for row in planned if row not in known]
        with Progress("screening", len(screened), " rows") as progress:
            for row in screened:
                row.screened = pool.submit(budgets_steps.timed, words, row).result()
                progress.add(1, row=row.name)
        near = {row.name for available in sizes for row in promising(known, available)}
        timed = [row for row in known if row.name in near and not any(row is one for one in planned)] + planned
        draw = random.Random(0)
        with Progress("timing", len(timed) * steps, " steps") as progress:
            for _ in range(steps):
                draw.shuffle(timed)
                for row in timed:
                    row.rates.append(pool.submit(budgets_steps.timed, words, row).result())
                    progress.add(1, row=row.name)
    lines = [_line(budget, row, made, known) for budget, (row, made) in plans.items()]
    shown = [asdict(row) | {"shown": row.shown} for row in known if row.screened]
    return about | {"rows": shown, "budgets": lines, "steps": steps, "timed": TIMED}


def promising(rows: list[Row], available: float) -> list[Row]:
    """Returns those that fit into so many MiB and may be the fastest there, or the fastest checkpointing."""
    fitting = [row for row in rows if row.screened and row.peak_mib <= available]
    found = []
    for kind in (fitting, [row for row in fitting if row.kind == CHECKPOINTED]):
        best = max((row.screened for row in kind), default=0.0)
        found += [row for row in kind if row.screened >= NEAR * best]
    return found


def _line(budget: str, row: Row, made: dict[str, Any], known: list[Row]) -> dict[str, Any]:
    """Returns how the plan of a budget compares with the rows that fit."""
    fitting = [one for one in known if one.peak_mib <= size("budget", budget) / MIB and one.rates]
    best = max(fitting, key=lambda one: one.rate, default=None)
    checkpointed = [one for one in fitting if one.kind == CHECKPOINTED]
    rival = max(checkpointed, key=lambda one: one.rate, default=None)
    return {
        "budget": budget,
        "plan": made["choices"][0]["about"],
        "peak_mib": row.peak_mib,
        "rate": row.rate,
        "rates": row.rates,
        "planning_seconds": made["seconds"],
        "choices": made["choices"],
        "best": best and best.name,
        "of_best": best and row.rate / best.rate,
        "checkpointing": rival and rival.name,
        "of_checkpointing": rival and row.rate / rival.rate,
    }


def main(argv: list[str]) -> dict[str, Any]:
    """Runs the comparison and writes its files."""
    given = OPTIONS | dict(word.split("=", 1) for word in argv if word.partition("=")[0] in OPTIONS)
    words = [word for word in argv if word.partition("=")[0] not in OPTIONS]
    words = [*([] if any(w.startswith("method=") for w in words) else ["method=bias"]), *words]
    if compose(words).backbone.checkpoint is None:
        words.append("backbone.pretrained=false")
    batch, budgets = int(given["batch"]), given["budgets"].split(",")
    words.append(f"optim.batch_size={batch}")
    found = compare(words, batch, budgets, int(given["steps"]), given["fidelity"], given["rows"])
    name = given["name"] or f"{compose(words).backbone.name}_{found['pixels']}px_b{batch}"
    result = {
        "name": name,
        "words": argv,
        "batch": batch,
        "machine": f"{found['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "environment": environment(found["device"]),
        "date": time.strftime("%Y-%m-%d"),
        **found,
    }
    out = Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{name}.json", json.dumps(result, indent=1, default=str) + "\n")
    atomic_write(out / f"{name}.md", markdown(result))
    figure(result, out / f"{name}.png")
    print(markdown(result))
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"planner: {error}")
