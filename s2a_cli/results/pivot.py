"""Tables with chosen rows, columns and value: `s2a table rows=method cols=dataset value=test_top1`.

Runs that share a cell are averaged. What differs between them, or between cells, and is not shown is said under the
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed, natural, nearest
from s2a_cli.results import summary
from s2a_cli.results.significance import leaders
from s2a_cli.results.vtab import VTAB, parse_groups


@dataclass(frozen=True)
class Value:
    """What cells show: a column of the runs, its title with the unit, the better direction, and whether seeds move
    it.
    """

    column: str
    title: str
    better: int = 1  # 1: higher, -1: lower
    digits: int = 2
    noisy: bool = True
    scale: float = 1.0


VALUES = {
    "test_top1": Value("accuracy.test_top1", "test top-1 %"),
    "val_top1": Value("accuracy.val_top1", "validation top-1 %"),
    "test_top5": Value("accuracy.test_top5", "test top-5 %"),
    "trainable": Value("parameters.trainable", "trainable M, head apart", -1, 3, False, 1e-6),
    "percent": Value("parameters.percent", "trainable % of the backbone, head apart", -1, 2, False),
    "peak": Value("memory.peak_mib", "peak MiB of a training step", -1, 1, False),
    "kept": Value("memory.kept_mib", "MiB kept for the backward pass", -1, 1, False),
    "x": Value("x_full", "full fine-tuning's peak / this peak", 1, 2, False),
    "images_per_s": Value("throughput.train_images_per_second", "training images/s, loaded", 1, 1),
}
MEASURABLE = ("memory.peak_mib", "memory.kept_mib", "x_full")  # columns that are measured or predicted
OWN = (
    "config.method.",
    "config.quant.",
    "config.optim.lr",
)  # differ from method to method and from quant to quant by design
SMOOTH = 1e-9


@dataclass(frozen=True)
class Mean:
    """A mean over data sets: of all of them, or of the means of groups."""

    title: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dataset for group in self.groups for dataset in group)

    def of(self, cells: pd.Series) -> float:
        """nan where a data set is missing."""
        return sum(cells.reindex(list(group)).mean(skipna=False) for group in self.groups) / len(self.groups)


@dataclass
class Grid:
    """`cells`: a line for each row and column label, with mean, std, n, state, mixed, kind and mark.

    `runs`: what they are of.
    """

    rows: list[str]
    cols: list[str]
    value: Value
    runs: pd.DataFrame
    cells: pd.DataFrame
    contender: list[str]  # the keys that compete for the best
    transposed: bool  # rows hold data sets: they were made columns, and are rows again when printed
    means: list[Mean] = field(default_factory=list)
    marks: dict = field(default_factory=dict)  # (row label, title of a mean) -> mark
    pairs: pd.DataFrame | None = None  # see pairs_of
    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[tuple[str, ...]]:
        return sorted(set(self.runs[self.cols].itertuples(index=False, name=None)), key=_order) if self.cols else [()]

    def lines(self) -> list[tuple[str, ...]]:
        return sorted(set(self.runs[self.rows].itertuples(index=False, name=None)), key=_order)

    def task(self, line: tuple[str, ...]) -> tuple[str, ...]:
        """The part of a row's label within which rows compete: rows of several backbones do not."""
        return tuple(label for key, label in zip(self.rows, line, strict=True) if key not in self.contender)


def _order(labels: tuple[str, ...]) -> tuple:
    return tuple(map(natural, labels))


def column_of(frame: pd.DataFrame, word: str, key: str) -> str:
    """The column of the runs behind a key: dataset, method, seed, optim.batch_size, ... Raises UserError for none."""
    for column in (key, f"config.{key}"):
        if column in frame and key:
            return column
    accepted = [
        *summary.BASE,
        "seed",
        *(c.removeprefix("config.") for c in frame if c.startswith(("config.", "environment."))),
    ]
    raise UserError(
        f"{word}={key}: no such key in these results; accepted: dataset, backbone, method, quant, seed and dotted keys"
        f" such as optim.batch_size{nearest(key, accepted)}"
    )


def value_of(name: str) -> Value:
    if name not in VALUES:
        raise UserError(f"value={name}: expected one of {', '.join(VALUES)}{nearest(name, VALUES)}")
    return VALUES[name]


def keep(frame: pd.DataFrame, wanted: dict[str, str], words: Iterable[str] = ()) -> pd.DataFrame:
    """The runs with dataset=pets,dtd optim.batch_size=16 ...

    Raises UserError when none is left; `words` are right too.
    """
    names = {short: column for column, short in summary.NAMES.items()}
    for key, values in wanted.items():
        column = next((c for c in (names.get(key), key, f"config.{key}") if c in frame), None)
        if column is None:
            known = [*words, *summary.BASE, *(c.removeprefix("config.") for c in frame if c.startswith("config."))]
            raise UserError(
                f"{key}={values}: no such word or key; expected {', '.join(words)}, or a key of the runs such as "
                f"dataset or optim.batch_size{nearest(key, known)}"
            )
        texts = frame[column].map(label)
        frame = frame[texts.isin(values.split(","))]
        if frame.empty:
            there = sorted(set(texts), key=natural)
            raise UserError(f"{key}={values}: no such run; there is {', '.join(there)}{nearest(values, there)}")
    return frame.reset_index(drop=True)


def label(value: object) -> str:
    if isinstance(value, float) and pd.notna(value):
        return f"{value:.10g}"
    return "null" if pd.isna(value) else str(value).lower() if isinstance(value, bool) else str(value)


def make(
    frame: pd.DataFrame, rows: list[str], cols: list[str], value: str = "test_top1", groups: str | None = None
) -> Grid:
    """The grid of the runs in `frame` (see tables.load). Raises UserError for a wrong key, value or group."""
    runs, chosen = summary.unique(frame), value_of(value)
    columns = {key: column_of(runs, word, key) for word, keys in (("rows", rows), ("cols", cols)) for key in keys}
    if len(columns) < len(rows) + len(cols):
        raise UserError(f"rows={','.join(rows)} cols={','.join(cols)}: a key stands there twice")
    transposed = bool(cols) and set(rows) <= {"dataset", "backbone"} and not set(cols) <= {"dataset", "backbone"}
    if transposed:
        rows, cols = cols, rows
    shown = pd.DataFrame({key: runs[column].map(label) for key, column in columns.items()})
    for key in shown:
        runs[key] = shown[key]
    runs["kind"] = runs["memory.kind"].astype(object).map(summary.KINDS)
    runs["x_full"] = summary.times_less(runs)
    runs["value"] = pd.to_numeric(runs[chosen.column]).where(runs["status"] == "ok") * chosen.scale
    notes = []
    if chosen.column in MEASURABLE:  # a measured and a predicted figure are not averaged
        several = (
            runs[runs["value"].notna()]
            .groupby([*rows, *cols])["kind"]
            .transform("nunique")
            .reindex(runs.index, fill_value=0)
            > 1
        )
        runs.loc[several & (runs["kind"] == "predicted"), "value"] = None
        if several.any():
            notes.append("Where a cell has measured and predicted runs, the measured ones are shown.")
    contender = [k for k in rows if k not in ("dataset", "backbone")] or [k for k in rows if k != "dataset"]
    hidden = Hidden(runs, set(columns.values()) | set(columns))
    grid = Grid(rows, cols, chosen, runs, _cells(runs, [*rows, *cols], hidden), contender, transposed, notes=notes)
    if cols == ["dataset"] and len(grid.columns()) > 1:
        grid.means, said = _means([c for (c,) in grid.columns()], groups)
        notes += said
    elif groups:
        raise UserError(f"groups={groups}: means over groups need rows=... cols=dataset, and more than one data set")
    _mark(grid, hidden)
    notes += hidden.notes([*rows, *cols]) + _failures(runs, [*rows, *cols])
    return grid


class Hidden:
    """What differs between runs and is not shown."""

    def __init__(self, runs: pd.DataFrame, shown: set[str]):
        self.counted = runs[runs["value"].notna()]
        settings = [
            *summary.BASE,
            *summary.settings_of(runs),
            *(c for c in runs if c.startswith("environment.")),
            "kind",
        ]
        found = [c for c in dict.fromkeys(settings) if c not in shown]
        self.texts = self.counted[found].map(label)
        self.keys = [c for c in found if self.texts[c].nunique() > 1]
        follow = [
            c
            for c in self.keys
            if c.startswith("config.quant.") and "config.quant.name" not in shown and "quant" in self.keys
        ]
        self.keys = [c for c in self.keys if c not in follow]  # the name says it
        self.settings = [c for c in self.keys if not c.startswith("environment.") and c != "kind"]

    @classmethod
    def of_environment(cls, frame: pd.DataFrame) -> Hidden:
        """Where a table shows all settings: what differs between the machines and versions."""
        runs = summary.unique(frame)
        kind = runs["memory.kind"].map(summary.KINDS)
        shown = {*summary.BASE, *summary.settings_of(runs), "kind"}
        return cls(runs.assign(value=runs["accuracy.test_top1"].where(runs["status"] == "ok"), kind=kind), shown)

    def follows(self, column: str, *owners: str) -> bool:
        """Whether the owners' values decide the column's."""
        groups = self.texts[column].groupby([self.counted[c].map(label) for c in owners])
        return bool((groups.nunique() <= 1).all())

    def by_design(self, column: str) -> bool:
        if column.startswith(OWN):
            return self.follows(column, "method", "quant", "backbone")
        if column.startswith("config.dataset.") or column == "data.revision":
            return self.follows(column, "dataset")
        if column == "weights" or (
            column.startswith("config.backbone.") and column.split(".")[2] not in ("image_size", "weights")
        ):
            return self.follows(column, "backbone")
        return False

    def mixed(self, keys: list[str]) -> pd.Series:
        """For each cell, whether it averages unlike runs."""
        by = [self.counted[key] for key in keys]
        return pd.concat([self.texts[c].groupby(by).nunique() > 1 for c in self.settings], axis=1).any(axis=1)

    def pairing(self, contender: list[str]) -> list[str]:
        """The columns in which a pair of runs agrees, beside the seed."""
        owned = set(contender) | ({"quant"} if "method" in contender else set())
        owned |= {"quant"} if any(key.startswith("quant.") for key in contender) else set()
        config = [c for c in self.settings if c not in summary.BASE and not c.startswith((*OWN, "weights"))]
        if "backbone" in contender:
            config = [c for c in config if not c.startswith("config.backbone.")]
        return [c for c in summary.BASE if c not in owned] + config + ([] if "seed" in contender else ["config.seed"])

    def notes(self, keys: list[str]) -> list[str]:
        """A line for each key that differs, with its values and, where one shown key decides them, whose they are."""
        names = {c: "memory" if c == "kind" else c.removeprefix("config.") for c in self.keys if not self.by_design(c)}
        said = [f"{name}: {self._who(self.texts[column], keys)}" for column, name in names.items()]
        cells = self.counted.groupby([self.counted[key] for key in keys])
        if "config.seed" in self.counted and "seed" not in keys:
            seeds = cells["config.seed"].agg(lambda seeds: " ".join(map(label, sorted(set(seeds)))))
            if seeds.nunique() > 1:
                counts = seeds.value_counts()
                said.append(
                    "seeds: " + "; ".join(f"{which} in {n} cell{'s'[: n > 1]}" for which, n in counts[:4].items())
                )
        return ["Not shown, and not the same everywhere: " + ". ".join(said) + "."] if said else []

    def _who(self, texts: pd.Series, keys: list[str]) -> str:
        for key in keys:
            values = texts.groupby(self.counted[key]).agg(lambda found: ", ".join(sorted(set(found), key=natural)))
            if (texts.groupby(self.counted[key]).nunique() == 1).all():
                whose = {value: list(values.index[values == value]) for value in sorted(set(values), key=natural)}
                return "; ".join(f"{value} ({key}={listed(names, 4)})" for value, names in list(whose.items())[:6])
        return listed(sorted(set(texts), key=natural), 4)


def _cells(runs: pd.DataFrame, keys: list[str], hidden: Hidden) -> pd.DataFrame:
    groups = runs.groupby(keys, sort=False)
    cells = groups["value"].agg(["mean", "std", "count"]).rename(columns={"count": "n"})
    cells["state"] = groups["status"].agg(summary.status_of)
    counted = runs[runs["value"].notna()].groupby(keys, sort=False)
    cells["kind"] = counted["kind"].agg(lambda kinds: " + ".join(sorted(set(kinds.dropna())))).reindex(cells.index)
    cells["mixed"] = hidden.mixed(keys).reindex(cells.index, fill_value=False) if hidden.settings else False
    cells["mark"] = ""
    return cells.sort_index()  # looked up by label


def _means(datasets: list[str], groups: str | None) -> tuple[list[Mean], list[str]]:
    """The mean columns and what must be said of them."""
    if not groups:
        return [Mean("mean", (tuple(datasets),))], []
    named = parse_groups(groups)
    if groups == "vtab" and not any(name.startswith("vtab_") for name in datasets):
        named = VTAB
    if not set(datasets) & {d for members in named.values() for d in members}:
        raise UserError(f"groups={groups}: none of their data sets is there; there is {', '.join(datasets)}")
    notes = []
    for name, members in named.items():
        if missing := [d for d in members if d not in datasets]:
            notes.append(
                f"{name}: no mean, {len(missing)} of {len(members)} data sets are missing ({listed(missing, 4)})."
            )
    if outside := [d for d in datasets if not any(d in members for members in named.values())]:
        notes.append(f"In no group, and in none of the means: {listed(outside, 4)}.")
    every = tuple(d for members in named.values() for d in members)
    means = [Mean(name, (members,)) for name, members in named.items()]
    return [*means, Mean("mean of data sets", (every,)), Mean("mean of groups", tuple(named.values()))], notes


def mean_of(grid: Grid, line: tuple[str, ...], mean: Mean) -> float:
    """A row's mean over data sets."""
    cells = grid.cells["mean"]
    found = {d: cells.get((*line, d), float("nan")) for d in mean.datasets}
    return mean.of(pd.Series(found, dtype=float))


def pairs_of(grid: Grid, hidden: Hidden) -> pd.DataFrame:
    """A line a pair, a column a row of the grid; the index holds what pairs agree in and the grid's column."""
    counted = grid.runs[grid.runs["value"].notna()]
    agree = [counted[c].map(label).rename(f"_{c}") for c in hidden.pairing(grid.contender)]
    values = (
        counted["value"].groupby([*agree, *(counted[k] for k in grid.cols), *(counted[k] for k in grid.rows)]).mean()
    )
    wide = values.unstack(grid.rows)
    wide.columns = [c if isinstance(c, tuple) else (c,) for c in wide.columns]
    return wide


def within(pairs: pd.DataFrame, key: str, wanted: Iterable[str]) -> pd.DataFrame:
    return pairs[pairs.index.get_level_values(key).isin(list(wanted))]


def _mark(grid: Grid, hidden: Hidden) -> None:
    """Sets `mark` in cells, and `marks` of the means: see compare.leaders; figures that no seed moves have a plain
    best.
    """
    grid.pairs = pairs_of(grid, hidden)
    if not grid.contender:
        return
    tasks: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for line in grid.lines():
        tasks.setdefault(grid.task(line), []).append(line)

    def judge(pairs: pd.DataFrame, means: pd.Series) -> dict:
        if grid.value.noisy:
            return leaders(pairs, means, grid.value.better)
        means = means.dropna() * grid.value.better
        return dict.fromkeys(means.index[means >= means.max() - SMOOTH], "best") if len(means) > 1 else {}

    def series(lines: list[tuple[str, ...]], values: Iterable[float]) -> pd.Series:
        return pd.Series(list(values), index=pd.Index(lines, tupleize_cols=False), dtype=float)

    if grid.value.column in MEASURABLE and grid.cells["kind"].dropna().nunique() > 1:
        grid.notes.append("No best: measured and predicted figures do not compete.")
        return
    for lines in tasks.values():
        for column in grid.columns():
            pairs = grid.pairs
            for key, name in zip(grid.cols, column, strict=True):
                pairs = within(pairs, key, [name])
            means = series(lines, (grid.cells["mean"].get(_at(line, column), float("nan")) for line in lines))
            for line, mark in judge(pairs, means).items():
                grid.cells.loc[_at(line, column), "mark"] = mark
        for mean in grid.means:
            means = series(lines, (mean_of(grid, line, mean) for line in lines))
            marks = judge(within(grid.pairs, "dataset", mean.datasets), means)
            grid.marks |= {(line, mean.title): mark for line, mark in marks.items()}


def _at(line: tuple[str, ...], column: tuple[str, ...]) -> tuple[str, ...] | str:
    place = (*line, *column)
    return place if len(place) > 1 else place[0]


def _failures(runs: pd.DataFrame, keys: list[str]) -> list[str]:
    failed = runs[runs["status"] != "ok"]
    if failed.empty:
        return []
    cells = [f"{summary.status_of(group)} ({', '.join(name)})" for name, group in failed.groupby(keys)["status"]]
    return [f"Not finished, and in no figure: {listed(cells, 6)}."]
