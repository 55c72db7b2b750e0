"""Tells what fits which device: the table of `s2a memory devices=`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from s2a_cli.common.progress import Progress
from s2a_cli.memory.margin import Margin
from s2a_cli.planner.candidates import MODES, PLAIN, RECOMPUTED, Candidate
from s2a_cli.planner.run_memory import Composition, Predictor
from s2a_cli.planner.search import Room

TINY = next(mode for mode in MODES if mode.name == "tiny")
MEANS = (  # name, mode of all blocks, weights
    ("stock PyTorch", PLAIN, None),
    ("exact checkpointing", RECOMPUTED, None),
    ("quant=tiny", TINY, None),
    ("quant=tiny backbone.weights=offload", TINY, "offload"),
)


@dataclass(frozen=True)
class Line:
    """A composition under one means, and the most images at a time on each device; 0 where not one fits."""

    name: str
    means: str
    batch: int
    most: tuple[int, ...]


def lines(
    compositions: Iterable[tuple[str, Composition]], devices: Sequence[int], margin: Margin, predictor: Predictor
) -> list[Line]:
    """Returns a line for each (name, composition) and means: devices by their bytes, the margin included.

    Micro-batches are as large as cut the batch into 1, 2, 3, 4, 6, 8, 12, ... of them. Raises UserError for a
    composition that can't be predicted.
    """
    compositions, found = list(compositions), []
    with Progress("predicting", len(compositions) * len(MEANS), " means") as progress:
        for name, composition in compositions:
            task = predictor.task(composition, 0.0, margin)
            rooms = [task.room()]
            rooms = [Room(rooms[0].needed, device, rooms[0].sizes, task.total) for device in devices]
            modes = task.modes(0.99)
            for means, mode, weights in MEANS:
                candidate = Candidate(1, mode, 0 if mode == PLAIN else task.total, task.total, weights)
                if mode in modes and task.stored(weights):
                    sizes = [room.fitting(candidate) for room in rooms]
                    found.append(Line(name, means, task.batch, tuple(max(fit, default=0) for fit in sizes)))
                progress.add(1, at=name)
    return found


def as_text(found: list[Line], devices: Sequence[str], margin: Margin, form: str) -> str:
    """Returns the lines as a table, as JSON or as CSV."""
    if form == "json":
        listed = [
            {"name": line.name, "means": line.means, "batch": line.batch, "most": dict(zip(devices, line.most))}
            for line in found
        ]
        return json.dumps(listed, indent=2)
    if form == "csv":
        rows = [["run", "means", *devices], *([line.name, line.means, *map(str, line.most)] for line in found)]
        return "\n".join(",".join(row) for row in rows)
    table = [[line.name, line.means, *(_cell(most, line.batch) for most in line.most)] for line in found]
    aligned = ("left", "left", *["right"] * len(devices))
    return "\n".join(
        [
            tabulate(table, ["run", "by", *devices], disable_numparse=True, colalign=aligned),
            "",
            "the most images at a time (micro-batch) that fit, of the batch of a step; –: not one; predicted",
            f"of each device: {margin}",
        ]
    )


def _cell(most: int, batch: int) -> str:
    return "–" if not most else f"all {batch}" if most == batch else str(most)
