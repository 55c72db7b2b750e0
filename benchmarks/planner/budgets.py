"""Plans for several budgets beside all that anybody could set by hand, side by side in one run on this device.

    python benchmarks/planner/budgets.py backbone=vit_b batch=64
    python benchmarks/planner/budgets.py backbone=vit_t batch=16 budgets=30MiB,60MiB steps=2 backbone.image_size=112

The rows are stock PyTorch, timm's checkpointing of whole blocks and ours, each in micro-batches of every size, and
the presets. A row counts at a budget where its predicted peak fits. Each row is first timed once. Rows that come near
the fastest that fits at some budget, or near the fastest checkpointing, are then timed together with all plans, in
one process: one step each, in an order drawn anew every round, of one shared model, after a micro-batch that is not
timed; medians. A plan with the settings of a row is that row: timed twice, it would differ from itself by what the
machine does meanwhile. Where micro-batches are small a step is cut to some 16 images: the rest would repeat them.
Wanted: a plan at 0.97 of the best row that fits or more, and 1.15 times as fast as checkpointing wherever that fits.
rows=REGEX takes rows with such names alone, where others are known to be slower. Writes OUT/NAME.json, .md and .png.
OMP_NUM_THREADS sets the CPU's threads. Words that are no options of this command are settings of the runs.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from budgets_report import figure, markdown

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.config.settings import replaced
from s2a_cli.memory.result import MIB
from s2a_cli.planner import plan
from s2a_cli.planner.sizes import size
from s2a_cli.planner.task import Task
from s2a_cli.training import forecast
from s2a_cli.training.environment import environment
from s2a_cli.training.run import attach, choose_device
from s2a_cli.training.step import Step, make_optimizer, train_mode

CLASSES = 100
BUDGETS = "400MiB,440MiB,500MiB,600MiB,900MiB,1600MiB,3200MiB,6GiB"
PRESETS = ("exact", "int8", "int5", "int4", "tiny")
CHECKPOINTED = "checkpointing"
TIMED = 16  # images of a step at least, in whole micro-batches
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


@dataclass
class Row:
    """A way to take a step, what it is predicted to need and what its steps took."""

    name: str
    settings: dict[str, Any]  # words of a run
    kind: str = "stock"
    timm: bool = False  # timm's own checkpointing is on
    peak_mib: float = 0.0
    screened: float = 0.0  # images a second at first sight
    rates: list[float] = field(default_factory=list)  # images a second, in steps beside others

    @property
    def rate(self) -> float:
        """Returns images a second."""
        return statistics.median(self.rates)

    @property
    def shown(self) -> str:
        """Returns images a second in words."""
        return f"{self.rate:.2f}" if self.rates else f"({self.screened:.2f})"


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


class Bench:
    """Holds one model, and takes steps of it under the settings of any row."""

    def __init__(self, words: list[str], batch: int):
        self.words, self.batch = [*words, f"optim.batch_size={batch}"], batch
        config = compose([*self.words, "quant=none"])
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.attached = attach(config, backbones.build(config.backbone, CLASSES))
        self.model = self.attached.model.to(self.device)
        train_mode(self.model)
        generator = torch.Generator().manual_seed(0)
        pixels = self.attached.backbone.image.size
        self.images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(self.device)
        self.targets = torch.randint(CLASSES, (batch,), generator=generator).to(self.device)
        self.optimizer = make_optimizer(config.optim, self.model, self.attached)
        self._steps: dict[str, Step] = {}

    def config(self, row: Row) -> Any:
        """Returns the config of a row; of a plan with the settings that it chose."""
        if row.kind == "plan":
            return replaced(compose(self.words), row.settings)
        return compose([*self.words, *(f"{key}={value}" for key, value in row.settings.items())])

    def is_same(self, one: Row, other: Row) -> bool:
        """Returns whether two rows are the same step."""
        configs = (self.config(row) for row in (one, other))
        first, second = (replaced(config, {"cuda_graphs": bool(config.cuda_graphs)}) for config in configs)
        return one.timm == other.timm and first == second

    @contextmanager
    def checkpointing(self, row: Row) -> Iterator[None]:
        """Switches timm's checkpointing on within, where the row has it."""
        switch = getattr(self.model, "set_grad_checkpointing", None)
        if row.timm and switch is None:
            raise UserError(f"timm's {type(self.model).__name__} has no gradient checkpointing")
        if row.timm:
            cast(Any, switch)(True)
        try:
            yield
        finally:
            if row.timm:
                cast(Any, switch)(False)

    def predict(self, row: Row) -> None:
        """Fills in the predicted peak of a row."""
        with self.checkpointing(row):
            row.peak_mib = forecast.profile_step(self.attached, self.config(row), self.batch).peak_bytes / MIB

    def screen(self, row: Row) -> None:
        """Fills in how fast a row is at first sight."""
        self._seconds(row, min(TIMED, self.batch))  # fits codes, and warms up
        row.screened = self.step(row)

    def step(self, row: Row) -> float:
        """Takes a step under the settings of a row and returns images a second."""
        micro = row.settings.get("optim.micro_batch") or self.batch
        images = min(self.batch, micro * -(-TIMED // micro))
        return images / self._seconds(row, images)

    def settle(self, row: Row) -> None:
        """Takes a micro-batch of a row, so that a CPU's memory is cut as its steps need it, not as the last one."""
        self._seconds(row, row.settings.get("optim.micro_batch") or self.batch)

    def _seconds(self, row: Row, images: int) -> float:
        key = json.dumps(row.settings, default=str)
        if key not in self._steps:
            self._steps[key] = Step(self.config(row), self.device, self.attached)
        with self.checkpointing(row):
            self._wait()
            begun = time.perf_counter()
            self._steps[key](self.model, self.optimizer, self.images[:images], self.targets[:images])
            self._wait()
            return time.perf_counter() - begun

    def _stored(self, weights: str | None) -> Any:
        if weights is not None:
            raise UserError(f"backbone.weights={weights}: weights stay as they are here")
        return self.attached

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plan(self, budget: str, fidelity: str) -> tuple[Row, dict[str, Any]]:
        """Returns the plan for a budget as a row, and all that is known of it. Raises UserError where nothing fits."""
        config = compose([*self.words, f"budget={budget}", f"fidelity={fidelity}"])
        task = Task(config, self.attached, CLASSES, self.batch, size("budget", budget))

        def refuse(least: float) -> str:
            return f"budget={budget}: nothing fits; the least is {least / MIB:,.1f} MiB"

        made = plan.make(task, (self.images, self.targets), self.device, self._stored, refuse)
        chosen = made["choices"][0]
        row = Row(chosen["about"], made["settings"], "plan", peak_mib=chosen["needed_mib"] or 0.0)
        return row, dict(made)


def compare(bench: Bench, budgets: list[str], steps: int, fidelity: str, names: str = ".") -> dict[str, Any]:
    """Returns the rows, the plan of each budget and how it compares with the best row that fits."""
    known = [row for row in rows(bench.batch) if re.search(names, row.name)]
    plans: dict[str, tuple[Row, dict[str, Any]]] = {}
    with Progress("predicting", len(known), " rows") as progress:
        for row in known:
            bench.predict(row)
            progress.add(1)
    for budget in budgets:
        try:
            row, made = bench.plan(budget, fidelity)
            same = (one for one in [*known, *(one for one, _ in plans.values())] if bench.is_same(one, row))
            plans[budget] = next(same, row), made
        except UserError as error:
            print(f"{budget}: {error}", file=sys.stderr)
    sizes = [size("budgets", budget) / MIB for budget in budgets]
    with Progress("screening", len(known), " rows") as progress:
        for row in known:
            if row.peak_mib <= max(sizes):
                bench.screen(row)
            progress.add(1, row=row.name)
    near = {row.name for available in sizes for row in promising(known, available)}
    planned = list({id(row): row for row, _ in plans.values()}.values())
    for row in planned:
        if not row.screened:
            bench.screen(row)
    timed = [row for row in known if row.name in near and not any(row is one for one in planned)] + planned
    draw = random.Random(0)
    with Progress("timing", len(timed) * steps, " steps") as progress:
        for _ in range(steps):
            draw.shuffle(timed)
            for row in timed:
                bench.settle(row)
                row.rates.append(bench.step(row))
                progress.add(1, row=row.name)
    lines = [_line(budget, row, made, known) for budget, (row, made) in plans.items()]
    shown = [asdict(row) | {"shown": row.shown} for row in known if row.screened]
    return {"rows": shown, "budgets": lines, "steps": steps, "timed": TIMED}


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
    bench = Bench(words, int(given["batch"]))
    about = environment(str(bench.device))
    name = given["name"] or f"{compose(words).backbone.name}_{bench.attached.backbone.image.size}px_b{given['batch']}"
    result = {
        "name": name,
        "words": argv,
        "batch": bench.batch,
        "machine": f"{bench.device}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "environment": about,
        "date": time.strftime("%Y-%m-%d"),
        **compare(bench, given["budgets"].split(","), int(given["steps"]), given["fidelity"], given["rows"]),
    }
    out = Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{name}.json", json.dumps(result, indent=1, default=str) + "\n")
    atomic_write(out / f"{name}.md", markdown(result))
    figure(result, out / f"{name}.png")
    print(markdown(result))
    return result


if __name__ == "__main__":
    import s2a_cli.methods  # noqa: F401 (its structures declare their settings)

    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"planner: {error}")
