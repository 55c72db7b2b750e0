"""Tables with chosen rows, columns and value: `s2a table rows=method cols=dataset value=test_top1`.

Runs that share a cell are averaged. What differs between them, or between cells, and is not shown is said under the
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed, natural, nearest
from s2a_cli.results.aggregate import (
    BASE,
    Differences,
    find_column,
    full_ratio,
    memory_kinds,
    over_seeds,
    runs_of,
    status_of,
)
from s2a_cli.results.formats import label
from s2a_cli.results.frames import column, columns, grouped, groups_of, numeric, where
from s2a_cli.results.significance import leaders, pairs_of, within
from s2a_cli.results.vtab import VTAB, parse_groups

SMOOTH = 1e-9
Label = tuple[str, ...]  # of a row or a column: a text for each of its keys


@dataclass(frozen=True)
class Value:
    """What cells show."""

    name: str  # what users type
    column: str  # of the runs
    title: str  # with the unit
    better: int = 1  # 1: higher, -1: lower
    digits: int = 2
    noisy: bool = True  # whether seeds move it
    scale: float = 1.0
    measurable: bool = False  # whether it is either measured or predicted


_VALUES = (
    Value("test_top1", "accuracy.test_top1", "test top-1 %"),
    Value("val_top1", "accuracy.val_top1", "validation top-1 %"),
    Value("test_top5", "accuracy.test_top5", "test top-5 %"),
    Value("test_balanced", "accuracy.test_balanced", "test accuracy %, mean over classes"),
    Value("val_balanced", "accuracy.val_balanced", "validation accuracy %, mean over classes"),
    Value("test_map", "accuracy.test_map", "test mAP %"),
    Value("val_map", "accuracy.val_map", "validation mAP %"),
    Value("trainable", "parameters.trainable", "trainable M, head apart", -1, 3, False, 1e-6),
    Value("percent", "parameters.percent", "trainable % of the backbone, head apart", -1, 2, False),
    Value("peak", "memory.peak_mib", "peak MiB of a training step", -1, 1, False, measurable=True),
    Value("kept", "memory.kept_mib", "MiB kept for the backward pass", -1, 1, False, measurable=True),
    Value("x", "x_full", "full fine-tuning's peak / this peak", 1, 2, False, measurable=True),
    Value("images_per_s", "throughput.train_images_per_second", "training images/s, loaded", 1, 1),
)
VALUES = {value.name: value for value in _VALUES}


@dataclass(frozen=True)
class Mean:
    """A mean over data sets: of all of them, or of the means of groups."""

    title: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dataset for group in self.groups for dataset in group)

    def of(self, cells: pd.Series) -> float:
        """Returns the mean of a figure for each data set; nan where a data set is missing."""
        means = [float(cells.reindex(list(group)).mean(skipna=False)) for group in self.groups]
        return sum(means) / len(means)


@dataclass
class Grid:
    """Runs as cells under chosen row and column labels."""

    rows: list[str]  # keys
    cols: list[str]
    value: Value
    runs: pd.DataFrame  # with the labels as columns, "value" and "kind" (measured | predicted)
    cells: pd.DataFrame  # a line for each label, with mean, std, n, state, kind, mixed (over unlike runs) and mark
    contender: list[str]  # the keys that compete for the best
    transposed: bool  # rows hold data sets: they were made columns, and are rows again when printed
    pairs: pd.DataFrame  # see significance.pairs_of
    means: list[Mean] = field(default_factory=list)
    marks: dict[tuple[Label, str], str] = field(default_factory=dict)  # (row label, title of a mean) -> mark
    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[Label]:
        """Returns the column labels, in their order."""
        return self._labels(self.cols)

    def lines(self) -> list[Label]:
        """Returns the row labels, in their order."""
        return self._labels(self.rows)

    def _labels(self, keys: list[str]) -> list[Label]:
        found = set(columns(self.runs, keys).itertuples(index=False, name=None)) if keys else {()}
        return sorted(cast(set[Label], found), key=order)

    def task(self, line: Label) -> Label:
        """Returns the part of a row's label within which rows compete: rows of several backbones do not."""
        return tuple(name for key, name in zip(self.rows, line, strict=True) if key not in self.contender)

    def counted(self, line: Label = ()) -> pd.DataFrame:
        """Returns the runs that have the value: all of them, or those of a row."""
        runs = where(self.runs, self.runs["value"].notna())
        for key, name in zip(self.rows, line, strict=bool(line)):
            runs = where(runs, runs[key] == name)
        return runs

    def mean_of(self, line: Label, mean: Mean) -> float:
        """Returns a row's mean over data sets."""
        cells = column(self.cells, "mean")
        found = {dataset: cells.get((*line, dataset), float("nan")) for dataset in mean.datasets}
        return mean.of(pd.Series(found, dtype=float))


def order(labels: Label) -> tuple[Any, ...]:
    """Returns a key that sorts labels as readers expect it, see formats.natural."""
    return tuple(map(natural, labels))


def place(line: Label, col: Label) -> Any:
    """Returns the index of a cell in Grid.cells."""
    return (*line, *col) if len(line) + len(col) > 1 else line[0]


def column_of(frame: pd.DataFrame, word: str, key: str) -> str:
    """Returns the column of the runs behind a key such as method or optim.batch_size. Raises UserError for none."""
    if (found := find_column(frame, key)) is not None:
        return found
    dotted = (c.removeprefix("config.") for c in frame if c.startswith(("config.", "environment.")))
    raise UserError(
        f"{word}={key}: no such key in these results; accepted: dataset, backbone, method, quant, seed and dotted keys"
        f" such as optim.batch_size{nearest(key, [*BASE, 'seed', *dotted])}"
    )


def value_of(name: str) -> Value:
    """Returns what `value=` names. Raises UserError for what is not in VALUES."""
    if name not in VALUES:
        raise UserError(f"value={name}: expected one of {', '.join(VALUES)}{nearest(name, VALUES)}")
    return VALUES[name]


def make(
    frame: pd.DataFrame, rows: list[str], cols: list[str], value: str | None = None, groups: str | None = None
) -> Grid:
    """Returns the grid of the runs in `frame`, see aggregate.load. Raises UserError for a wrong key, value or group.

    value: one of VALUES; by default test_top1, or test_map where no run has the former.
    """
    runs = runs_of(frame)
    top1, mean_ap = (any(column(runs, f"accuracy.test_{name}").notna()) for name in ("top1", "map"))
    chosen = value_of(value or ("test_map" if mean_ap and not top1 else "test_top1"))
    shown = {key: column_of(runs, word, key) for word, keys in (("rows", rows), ("cols", cols)) for key in keys}
    if len(shown) < len(rows) + len(cols):
        raise UserError(f"rows={','.join(rows)} cols={','.join(cols)}: a key stands there twice")
    transposed = bool(cols) and set(rows) <= {"dataset", "backbone"} and not set(cols) <= {"dataset", "backbone"}
    if transposed:
        rows, cols = cols, rows
    runs = runs.assign(**{key: column(runs, name).map(label) for key, name in shown.items()})
    runs, notes = _with_value(runs, chosen, [*rows, *cols])
    differences = Differences(where(runs, runs["value"].notna()), {*shown, *shown.values()})
    contender = [key for key in rows if key not in ("dataset", "backbone")] or [key for key in rows if key != "dataset"]
    cells, pairs = _cells(runs, [*rows, *cols], differences), pairs_of(differences, contender, cols, rows)
    grid = Grid(rows, cols, chosen, runs, cells, contender, transposed, pairs, notes=notes)
    others, said = _of_another_metric(runs, chosen)
    notes += said
    datasets = [label[0] for label in grid.columns() if label and label[0] not in others]
    if cols == ["dataset"] and len(datasets) > 1:
        grid.means, said = _means(datasets, groups)
        notes += said
    elif groups:
        raise UserError(f"groups={groups}: means over groups need rows=... cols=dataset, and more than one data set")
    _mark(grid)
    notes += differences.notes([*rows, *cols]) + _failures(runs, [*rows, *cols])
    return grid


def _with_value(runs: pd.DataFrame, chosen: Value, keys: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the runs with "kind", "x_full" and "value", and a note where a part of a cell's runs has no value."""
    runs = runs.assign(kind=memory_kinds(runs), x_full=full_ratio(runs))
    runs["value"] = numeric(column(runs, chosen.column)).where(runs["status"] == "ok") * chosen.scale
    if not chosen.measurable:
        return runs, []
    kinds = grouped(where(runs, runs["value"].notna()), keys)["kind"].transform("nunique")
    several = kinds.reindex(runs.index, fill_value=0) > 1  # a measured and a predicted figure are not averaged
    runs.loc[several & (runs["kind"] == "predicted"), "value"] = None
    said = ["Where a cell has measured and predicted runs, the measured ones are shown."]
    return runs, said if any(several) else []


def _of_another_metric(runs: pd.DataFrame, chosen: Value) -> tuple[set[str], list[str]]:
    """Returns the data sets whose runs have mAP in place of a chosen accuracy, or the reverse, and a note on them."""
    split, _, metric = chosen.name.partition("_")
    other = VALUES.get(f"{split}_{'top1' if metric == 'map' else 'map'}")
    if not chosen.column.startswith("accuracy.") or other is None or other.column not in runs:
        return set(), []
    has, has_other = (column(where(runs, column(runs, name).notna()), "dataset") for name in ("value", other.column))
    found = set(has_other) - set(has)
    said = f"{listed(sorted(found), 4)}: no {chosen.title}, and in no mean; value={other.name} shows {other.title}."
    return found, [said] if found else []


def _cells(runs: pd.DataFrame, keys: list[str], differences: Differences) -> pd.DataFrame:
    found = over_seeds(columns(runs, ["value"]), column(runs, "status"), [column(runs, key) for key in keys])
    cells = pd.DataFrame({"mean": found.mean["value"], "std": found.std["value"], "n": found.n["value"]})
    cells["state"] = found.status
    kinds = grouped(differences.rows, keys, sort=False)["kind"]
    cells["kind"] = kinds.agg(lambda kinds: " + ".join(sorted(set(kinds.dropna())))).reindex(cells.index)
    unlike = differences.unlike(keys).reindex(cells.index, fill_value=False) if differences.settings else False
    return cells.assign(mixed=unlike, mark="").sort_index()  # looked up by label


def _means(datasets: list[str], groups: str | None) -> tuple[list[Mean], list[str]]:
    """Returns the mean columns and what must be said of them."""
    if not groups:
        return [Mean("mean", (tuple(datasets),))], []
    named = parse_groups(groups)
    if groups == "vtab" and not any(name.startswith("vtab_") for name in datasets):
        named = VTAB
    if not set(datasets) & {d for members in named.values() for d in members}:
        raise UserError(f"groups={groups}: none of their data sets is there; there is {', '.join(datasets)}")
    notes = []
    for name, members in named.items():
        if lack := [d for d in members if d not in datasets]:
            notes.append(f"{name}: no mean, {len(lack)} of {len(members)} data sets are missing ({listed(lack, 4)}).")
    if outside := [d for d in datasets if not any(d in members for members in named.values())]:
        notes.append(f"In no group, and in none of the means: {listed(outside, 4)}.")
    every = tuple(d for members in named.values() for d in members)
    means = [Mean(name, (members,)) for name, members in named.items()]
    return [*means, Mean("mean of data sets", (every,)), Mean("mean of groups", tuple(named.values()))], notes


def _mark(grid: Grid) -> None:
    """Sets `mark` in cells and `marks` of the means, see significance.leaders.

    Figures that no seed moves have a plain best.
    """
    if not grid.contender:
        return
    if grid.value.measurable and len(set(grid.cells["kind"].dropna())) > 1:
        grid.notes.append("No best: measured and predicted figures do not compete.")
        return
    tasks: dict[Label, list[Label]] = {}
    for line in grid.lines():
        tasks.setdefault(grid.task(line), []).append(line)
    cells = column(grid.cells, "mean")
    for lines in tasks.values():
        for col in grid.columns():
            pairs = grid.pairs
            for key, name in zip(grid.cols, col, strict=True):
                pairs = within(pairs, key, [name])
            shown = (cells.get(place(line, col), float("nan")) for line in lines)
            for line, mark in _judge(grid, pairs, lines, shown).items():
                grid.cells.loc[place(line, col), "mark"] = mark
        for mean in grid.means:
            pairs, shown = within(grid.pairs, "dataset", mean.datasets), (grid.mean_of(line, mean) for line in lines)
            marks = _judge(grid, pairs, lines, shown)
            grid.marks |= {(line, mean.title): mark for line, mark in marks.items()}


def _judge(grid: Grid, pairs: pd.DataFrame, lines: list[Label], shown: Iterable[Any]) -> dict[Label, str]:
    means = pd.Series(list(shown), index=pd.Index(lines, tupleize_cols=False), dtype=float)
    if grid.value.noisy:
        return leaders(pairs, means, grid.value.better)
    means = means.dropna() * grid.value.better
    return dict.fromkeys(means.index[means >= means.max() - SMOOTH], "best") if len(means) > 1 else {}


def _failures(runs: pd.DataFrame, keys: list[str]) -> list[str]:
    failed = where(runs, runs["status"] != "ok")
    if failed.empty:
        return []
    cells = [f"{status_of(column(group, 'status'))} ({', '.join(name)})" for name, group in groups_of(failed, keys)]
    return [f"Not finished, and in no figure: {listed(cells, 6)}."]
