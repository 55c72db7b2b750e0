"""Runs `s2a memory`: predicts what compositions need, where it is, and what fits a device."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import expand
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.replay import replay
from s2a_cli.planner import devices, report
from s2a_cli.planner.batch_size import device_size, largest_batch, size
from s2a_cli.planner.fallbacks import options
from s2a_cli.planner.report import Fitted, Prediction, Row
from s2a_cli.planner.run_memory import Composition, Predictor
from s2a_cli.planner.run_plan import plan_composition
from s2a_cli.training.run import choose_device

# Words that are not of the composition.
OPTIONS = ("format", "figure", "fit", "devices", "context", "fragmentation", "expandable_segments", "processes")
OPTIONS += ("snapshot",)
FORMATS = ("terminal", "json", "csv")
FIGURES = (".png", ".svg", ".pdf")


def run(words: list[str]) -> int:
    """Prints the prediction of one composition, or a table of several. Raises UserError for bad input."""
    force, words = "--force" in words, [word for word in words if word != "--force"]
    given = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OPTIONS)
    rest = [word for word in words if word.partition("=")[0] not in OPTIONS]
    form, figure = given.get("format", "terminal"), Path(given["figure"]) if "figure" in given else None
    if form not in FORMATS:
        raise UserError(f"format={form}: expected one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    if figure and figure.suffix not in FIGURES:
        raise UserError(f"figure={figure}: expected a file that ends in one of {', '.join(FIGURES)}")
    if "snapshot" in given:
        if rest or len(given) > 1:
            raise UserError("snapshot=FILE replays what a device has recorded, and takes no other word")
        print(report.replayed(replay(Path(given["snapshot"]).expanduser())))
        return 0
    if figure:
        from s2a_cli.results import made_files

        made_files.check_out(figure, "figure", force)
    available, margin = device_size(given["fit"]) if "fit" in given else None, _margin(given)
    predictor = Predictor(_processes(given.get("processes", "1")))
    grid = expand(rest)
    varied = [place for place in range(len(rest)) if len({member[place] for member in grid}) > 1]
    rows = []
    if "devices" in given:
        return _devices(given, grid, varied, margin, predictor)
    for number, member in enumerate(grid, 1):
        config = compose(member)
        if config.device not in ("auto", "cpu"):
            choose_device(config.device)  # one that is not there is a mistake
        row = Row(" ".join(member[place] for place in varied) or "this run", Composition.of(config))
        if len(grid) > 1 and sys.stderr.isatty():
            print(f"\r\033[Kpredicting {number} of {len(grid)}: {row.name}", end="", file=sys.stderr, flush=True)
        _predict(row, predictor, available, margin, alone=len(grid) == 1)
        rows.append(row)
    if len(grid) > 1 and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if form == "terminal":
        print(report.one(rows[0]) if len(rows) == 1 else report.several(rows))
    else:
        print(report.as_json(rows) if form == "json" else report.as_csv(rows))
    if figure:
        from s2a_cli.planner import plot

        plot.save(rows, figure, force)
    return 0


def _devices(
    given: dict[str, str], grid: list[list[str]], varied: list[int], margin: Margin, predictor: Predictor
) -> int:
    """Prints which devices what fits. Raises UserError for sizes that can't be read."""
    if odd := next((key for key in ("fit", "figure") if key in given), None):
        raise UserError(f"{odd}={given[odd]}: goes without devices=, which is a table of its own")
    names = given["devices"].split(",")
    sizes = [size("devices", name) for name in names]
    compositions = [
        (" ".join(member[place] for place in varied) or "this run", Composition.of(compose(member))) for member in grid
    ]
    found = devices.lines(compositions, sizes, margin, predictor)
    print(devices.as_text(found, names, margin, given.get("format", "terminal")))
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


def _margin(given: dict[str, str]) -> Margin:
    """Returns the margin that these options ask for. Raises UserError for values that can't be."""
    margin = Margin()
    if "context" in given:
        margin = replace(margin, context=size("context", given["context"]))
    if "fragmentation" in given:
        text = given["fragmentation"]
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 <= share < 1:
            raise UserError(
                f"fragmentation={text}: expected a share of what the allocator takes, at least 0 and below 1, such as"
                " 0.05 or 5%"
            )
        margin = replace(margin, fragmentation=share)
    if (text := given.get("expandable_segments")) is not None:
        if text not in ("true", "false"):
            raise UserError(f"expandable_segments={text}: expected true or false, as PYTORCH_CUDA_ALLOC_CONF sets it")
        margin = replace(margin, expandable_segments=text == "true")
    return margin


def _processes(text: str) -> int:
    """Returns the number behind `processes=`. Raises UserError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise UserError(f"processes={text}: expected the number of processes that share a batch, at least 1")
    return int(text)
