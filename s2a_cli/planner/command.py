"""Runs `s2a memory`: predicts what compositions need, where it is, and what fits a device."""

from __future__ import annotations

import sys

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.replay import replay
from s2a_cli.planner import devices, report
from s2a_cli.planner.batch_size import device_size, largest_batch
from s2a_cli.planner.fallbacks import options
from s2a_cli.planner.report import Fitted, Prediction, Row
from s2a_cli.planner.request import Request
from s2a_cli.planner.run_memory import Composition, Predictor
from s2a_cli.planner.run_plan import plan_composition
from s2a_cli.planner.sizes import size
from s2a_cli.training.run import choose_device


def run(asked: Request) -> int:
    """Prints the prediction of one composition, or a table of several. Raises UserError for bad input."""
    if asked.snapshot:
        print(report.replayed(replay(asked.snapshot)))
        return 0
    available, margin = device_size(asked.fit) if asked.fit else None, Margin(**asked.margin)
    predictor = Predictor(asked.processes)
    rows, grid = [], asked.grid
    if asked.devices:
        return _devices(asked, margin, predictor)
    for number, member in enumerate(grid, 1):
        config = compose(member)
        if config.device not in ("auto", "cpu"):
            choose_device(config.device)  # one that is not there is a mistake
        row = Row(asked.name(member), Composition.of(config))
        if len(grid) > 1 and sys.stderr.isatty():
            print(f"\r\033[Kpredicting {number} of {len(grid)}: {row.name}", end="", file=sys.stderr, flush=True)
        _predict(row, predictor, available, margin, alone=len(grid) == 1)
        rows.append(row)
    if len(grid) > 1 and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if asked.form == "terminal":
        print(report.one(rows[0]) if len(rows) == 1 else report.several(rows))
    else:
        print(report.as_json(rows) if asked.form == "json" else report.as_csv(rows))
    if asked.figure:
        from s2a_cli.planner import plot

        plot.save(rows, asked.figure, asked.force)
    return 0


def _devices(asked: Request, margin: Margin, predictor: Predictor) -> int:
    """Prints which devices what fits."""
    sizes = [size("devices", name) for name in asked.devices]
    compositions = [(asked.name(member), Composition.of(compose(member))) for member in asked.grid]
    found = devices.lines(compositions, sizes, margin, predictor)
    print(devices.as_text(found, asked.devices, margin, asked.form))
    return 0


def _predict(row: Row, predictor: Predictor, available: int | None, margin: Margin, alone: bool) -> None:
    """Fills in a row, with a budget that of its plan; where one of several can't be predicted, with the reason."""
    try:
        if row.composition.config.budget:
            row.planned(plan_composition(row.composition, predictor.processes))
        row.predicted = Prediction(predictor(row.composition), predictor.full(row.composition))
    except UserError as error:
        if alone:
            raise
        row.problem = " ".join(str(error).splitlines())
        return
    if available is not None:
        needed = margin.needed(row.predicted.profile)
        largest = largest_batch(row.composition.config, available, margin, predictor)
        tried = []
        if alone and needed > available:
            tried = list(options(predictor.task(row.composition, available, margin)))
        row.fitted = Fitted(available, margin, needed, largest, tried)
