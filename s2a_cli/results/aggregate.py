"""Records as rows, rows over seeds, and what differs between runs without being shown.

All that shows several runs is made of these three steps: `summary` (a row a setting), `pivot` (chosen rows and
columns), `significance` (which runs pair) and `html_report`. They agree in which runs are alike because they ask here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line, listed, natural, nearest, printable
from s2a_cli.results import record, run_folder
from s2a_cli.results.formats import label
from s2a_cli.results.frames import column, column_counts, columns, grouped, is_missing, where
from s2a_cli.results.record import NOT_IDENTITY

# Runs that differ in these alone share a row. method.lr and lr_scale but make the default of optim.lr.
SHARED = {f"config.{key}" for key in (*NOT_IDENTITY, "seed", "method.lr", "backbone.lr_scale", "dataset.name")}
BASE = ["dataset", "backbone", "method", "quant"]
NAMES = dict(zip(["data.name", "config.backbone.name", "config.method.name", "config.quant.name"], BASE, strict=True))
KINDS = {"measured-cuda": "measured", "predicted": "predicted"}
FIGURES = {
    "top1": "accuracy.test_top1",  # %
    "map": "accuracy.test_map",  # %, where images have several labels
    "trainable": "parameters.trainable",  # head apart
    "percent": "parameters.percent",  # of the backbone, head apart
    "peak_mib": "memory.peak_mib",
    "full_peak_mib": "memory.full_finetune_peak_mib",
    "images_per_s": "throughput.train_images_per_second",
}
# What full fine-tuning must share with a run for their measured peaks to be comparable.
SAME_STEP = ["dataset", "backbone", "config.backbone.image_size", "config.optim.name", "config.optim.momentum"]
SAME_STEP += ["config.optim.batch_size", "config.optim.micro_batch", "config.precision", "environment.device"]
# Columns that begin so differ by design from one value of these keys to the next.
OWN = ("config.method.", "config.quant.", "config.optim.lr")
OWNERS = {
    OWN: ("method", "quant", "backbone"),
    ("config.dataset.", "data.revision"): ("dataset",),
    ("config.backbone.", "weights"): ("backbone",),
}
NO_OWNER = ("config.backbone.image_size", "config.backbone.weights")  # a reader compares runs by them


# Records as rows


def load(places: Iterable[str | Path]) -> pd.DataFrame:
    """Returns a row for each result.json below the `places`, its keys as dotted columns such as "config.optim.lr".

    Names files that can't be read on stderr and leaves them out. Raises UserError when a folder or every run is
    missing.
    """
    found, unreadable = read(places)
    tell(unreadable, f"of {len(unreadable) + len(found)} results")
    if found.empty:
        raise UserError(f"no finished runs below {', '.join(map(str, places))}; make one with: s2a train")
    return found


def tell(unreadable: list[str], of: str = "files") -> None:
    """Names on stderr the files that were left out."""
    if unreadable:
        print(f"s2a: {len(unreadable)} {of} can't be read, left out:", *unreadable, sep="\n  ", file=sys.stderr)


def read(places: Iterable[str | Path]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the rows of `load`, and a line for each file that can't be read.

    The status of a run that is at work is "running". Raises UserError when a folder is missing.
    """
    for folder in map(Path, places):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give folders that hold runs")
    paths = {os.path.realpath(path) for folder in places for path in _result_files(folder)}
    rows, unreadable = [], []
    for path in sorted(paths):
        try:
            result: dict[str, Any] = dict(record.load(path))
        except (OSError, ValueError) as error:
            unreadable.append(printable(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}"))
            continue
        if result["status"] == "interrupted" and run_folder.at_work(Path(path).parent):
            result |= {"status": "running", "error": None}
        rows.append(flatten(result) | {"path": path})
    return pd.DataFrame(rows), unreadable


def from_results(results: Iterable[Any]) -> pd.DataFrame:
    """Returns the rows of `load` from results at hand."""
    return pd.DataFrame([flatten(result) for result in results])


def _result_files(folder: str | Path) -> Iterable[str]:
    for parent, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if name != run_folder.NEXT]  # what may once replace the run in `parent`
        if run_folder.RECORD in files:
            yield os.path.join(parent, run_folder.RECORD)


def flatten(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a result with dotted keys, lists as JSON text, and control characters in texts as escapes.

    Raises KeyError without the keys that every result has.
    """
    flat: dict[str, Any] = {}
    if result.get("plan"):  # plans of the same words may differ with the minute: their runs belong together
        result = result | {"config": record.asked(cast(record.Result, result)) | {"quant": {"name": "planned"}}}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                text = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
                flat[printable(f"{prefix}{key}")] = printable(text) if isinstance(text, str) else text

    walk(result, "")
    for key in ("id", "status", *NAMES):
        if flat.get(key) is None:
            raise KeyError(key)
    return {key: value for key, value in flat.items() if key not in BASE}  # an early record had a key "quant"


def select(frame: pd.DataFrame, wanted: dict[str, str], words: Iterable[str] = ()) -> pd.DataFrame:
    """Returns the runs that have what is wanted: {"dataset": "pets,dtd", "optim.batch_size": "16"}.

    words: of the command, among which a mistyped key is looked for too. A text that is a value as it stands, commas and
    all, is that one. Raises UserError when no run is left.
    """
    for key, values in wanted.items():
        name = find_column(frame, key)
        if name is None:
            known = [*words, *BASE, *(c.removeprefix("config.") for c in frame if c.startswith("config."))]
            raise UserError(
                f"{key}={values}: no such word or key; expected {', '.join(words)}, or a key of the runs such as "
                f"dataset or optim.batch_size{nearest(key, known)}"
            )
        texts = column(frame, name).map(label)
        whole = texts == values
        frame = where(frame, whole if any(whole) else texts.isin(values.split(",")))
        if frame.empty:
            there = sorted(set(texts), key=natural)
            raise UserError(f"{key}={values}: no such run; there is {', '.join(there)}{nearest(values, there)}")
    return frame.reset_index(drop=True)


def find_column(frame: pd.DataFrame, key: str) -> str | None:
    """Returns the column behind a key that users type (dataset, seed, optim.batch_size); None without one."""
    names = {short: name for name, short in NAMES.items()}
    return next((name for name in (names.get(key), key, f"config.{key}") if name in frame and key), None)


def runs_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns each run once, as a copy of a run is not another one.

    The names of data set, backbone, method and quant are in the columns of BASE. No column of FIGURES is missing.
    """
    optional = [*FIGURES.values(), *SAME_STEP[2:], "accuracy.val_map", "memory.kind", "memory.full_finetune_kind"]
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, *optional])))
    return frame.drop_duplicates(["id", "status", "memory.kind"]).rename(columns=NAMES).reset_index(drop=True)


def settings_of(runs: pd.DataFrame) -> list[str]:
    """Returns the columns that decide what a run computes, seeds apart."""
    return [c for c in runs if (c.startswith("config.") and c not in SHARED) or c in ("data.revision", "weights")]


def memory_kinds(runs: pd.DataFrame) -> pd.Series:
    """Returns how each run's memory is known: measured, predicted, or missing."""
    return column(runs, "memory.kind").astype(object).map(cast(Any, KINDS))


def varying(runs: pd.DataFrame, keys: Iterable[str] = ("backbone", "method", "quant")) -> list[str]:
    """Returns the keys of which the runs have several values."""
    return [key for key in keys if column(runs, key).nunique() > 1]


# Rows over seeds


@dataclass(frozen=True)
class OverSeeds:
    """Figures of groups of runs: a line a group, a column a figure."""

    mean: pd.DataFrame
    std: pd.DataFrame  # nan for a single value
    n: pd.DataFrame  # how many runs have the figure
    status: pd.Series  # "ok", or how many runs ended how: "2 ok, 1 oom"


def over_seeds(figures: pd.DataFrame, status: pd.Series, by: list[pd.Series]) -> OverSeeds:
    """Returns the figures of runs over the groups that `by` makes; a figure that is nan is left out."""
    groups = grouped(figures, by, sort=False)
    ended = grouped(status, by, sort=False).agg(status_of)
    return OverSeeds(groups.mean(), groups.std(), groups.count(), ended)


def status_of(status: pd.Series) -> str:
    """Returns ok, or how many runs ended how: "2 ok, 1 oom"."""
    counts = status.value_counts().sort_index(key=lambda index: index != "ok")
    return "ok" if list(counts.index) == ["ok"] else ", ".join(f"{n} {name}" for name, n in counts.items())


def add_full_ratio(rows: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Returns the rows with x_full, full fine-tuning's peak / the row's, and x_full_against, the kind of the former.

    Full fine-tuning's peak is of the same kind as the row's wherever there is one.
    """
    bits = [c for c in settings if c.startswith("config.quant.") and c != "config.quant.group"]
    unquantized = columns(rows, bits).isna().all(axis=1)
    full = where(rows, (rows["method"] == "full") & (rows["memory"] == "measured") & unquantized)
    full = columns(full.drop_duplicates(SAME_STEP), [*SAME_STEP, "peak_mib"]).rename(columns={"peak_mib": "measured"})
    measured = column(rows.merge(full, on=SAME_STEP, how="left"), "measured")
    use = (rows["memory"] == "measured") & measured.notna()
    rows["x_full"] = measured.where(use, rows["full_peak_mib"]) / rows["peak_mib"]
    rows["x_full_against"] = column(rows, "memory.full_finetune_kind").map(cast(Any, KINDS)).mask(use, "measured")
    return rows


def full_ratio(runs: pd.DataFrame) -> pd.Series:
    """Returns full fine-tuning's peak / the run's peak of each run, see add_full_ratio."""
    runs = runs.rename(columns={name: short for short, name in FIGURES.items()})
    return column(add_full_ratio(runs.assign(memory=memory_kinds(runs)), settings_of(runs)), "x_full")


# What differs and is not shown


def exact(value: object) -> str:
    """Returns a value as text, every digit of it; a missing one, whatever pandas holds for it, as an empty text."""
    return "" if is_missing(value) else str(value)


class Differences:
    """What differs between rows and is not shown.

    rows: of runs or of settings, with the columns of BASE. shown: the columns that a reader sees. text: tells values
    apart.
    """

    def __init__(self, rows: pd.DataFrame, shown: Iterable[str], text: Callable[[object], str] = label):
        seen = set(shown)
        candidates = [*BASE, *settings_of(rows), *(c for c in rows if c.startswith("environment.")), "kind"]
        self.rows = rows
        self.texts = columns(rows, [c for c in dict.fromkeys(candidates) if c not in seen and c in rows]).map(text)
        keys = [c for c in self.texts if len(set(self.texts[c])) > 1]
        named = "quant" in keys and "config.quant.name" not in seen  # the name says what its settings are
        self.keys = [c for c in keys if not (named and c.startswith("config.quant."))]
        self.settings = [c for c in self.keys if not c.startswith("environment.") and c != "kind"]

    def by_design(self, name: str, within: tuple[str, ...] = ()) -> bool:
        """Returns whether the keys that own a column, and those of `within`, decide its value."""
        return self._decided(name, tuple(dict.fromkeys((*_owners(name), *within))))

    def _decided(self, name: str, keys: tuple[str, ...]) -> bool:
        return bool(keys) and all(grouped(column(self.texts, name), [self.rows[key] for key in keys]).nunique() <= 1)

    def to_show(self) -> list[str]:
        """Returns the settings that a table with the columns of BASE must show.

        Without them two rows look alike, or unlike runs are compared: rows of one data set and backbone.
        """
        found = [c for c in self.settings if not self.by_design(c, ("dataset", "backbone"))]
        bits = self.texts.get("config.quant.bits")
        follow = [c for c in found if c.startswith("config.quant.") and c != "config.quant.bits" and bits is not None]
        return [c for c in found if c not in follow or not column(self.texts, c).equals(bits)]  # bits of all families

    def unlike(self, by: list[str]) -> pd.Series:
        """Returns for each group of `by` whether unlike rows are in it, and its mean is one over them."""
        keys = [self.rows[key] for key in by]
        return pd.concat([grouped(self.texts[c], keys).nunique() > 1 for c in self.settings], axis=1).any(axis=1)

    def pairing(self, contender: list[str]) -> list[str]:
        """Returns the columns in which two runs must agree to be a pair of what `contender` compares."""
        owned = set(contender) | ({"quant"} if "method" in contender else set())
        owned |= {"quant"} if any(key.startswith("quant.") for key in contender) else set()
        config = [c for c in self.settings if c not in BASE and not c.startswith((*OWN, "weights"))]
        if "backbone" in contender:
            config = [c for c in config if not c.startswith("config.backbone.")]
        return [c for c in BASE if c not in owned] + config + ([] if "seed" in contender else ["config.seed"])

    def notes(self, keys: list[str]) -> list[str]:
        """Returns a line for what differs, with its values and, where one of the shown `keys` decides them, whose."""
        names = {c: "memory" if c == "kind" else c.removeprefix("config.") for c in self.keys if not self.by_design(c)}
        said = [f"{name}: {self._who(column(self.texts, c), keys)}" for c, name in names.items()]
        if "config.seed" in self.rows and "seed" not in keys:
            groups = grouped(column(self.rows, "config.seed"), [self.rows[key] for key in keys])
            counts = column_counts(groups.agg(lambda seeds: " ".join(map(label, sorted(set(seeds))))))
            if len(counts) > 1:
                told = "; ".join(f"{which} in {n} cell{'s'[: n > 1]}" for which, n in counts[:4])
                said.append(f"seeds: {told}")
        return ["Not shown, and not the same everywhere: " + ". ".join(said) + "."] if said else []

    def _who(self, texts: pd.Series, keys: list[str]) -> str:
        for key in keys:
            groups = grouped(texts, self.rows[key])
            if all(groups.nunique() == 1):
                values = groups.agg(lambda found: ", ".join(sorted(set(found), key=natural)))
                whose = {value: list(values.index[values == value]) for value in sorted(set(values), key=natural)}
                return "; ".join(f"{value} ({key}={listed(names, 4)})" for value, names in list(whose.items())[:6])
        return listed(sorted(set(texts), key=natural), 4)


def hidden_notes(frame: pd.DataFrame, shown: Iterable[str]) -> list[str]:
    """Returns what differs between machines, versions and seeds, and between settings that a table does not show.

    shown: its columns beside those of BASE.
    """
    seen = {*BASE, *(name for key in shown if (name := find_column(frame, key)))}
    return Differences(_tested(frame), seen).notes(["method", "quant", "dataset", "backbone"])


def splitting(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """Returns the settings, as users type them, in which runs differ that have the same value of each of these keys."""
    runs, names = _tested(frame), {name: key for key in keys if (name := find_column(frame, key))}
    shown = [NAMES.get(name, name) for name in names]
    differences = Differences(runs, shown)
    groups = [column(runs, name) for name in shown]
    found = [c for c in differences.to_show() if c not in BASE]
    unlike = [c for c in found if (grouped(column(differences.texts, c), groups).nunique() > 1).any()]
    return [c.removeprefix("config.") for c in unlike]


def _tested(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns each finished run that has a score once."""
    runs = runs_of(frame)
    tested = columns(runs, ["accuracy.test_top1", "accuracy.test_map"]).notna().any(axis=1)
    return where(runs, (runs["status"] == "ok") & tested)


def _owners(name: str) -> tuple[str, ...]:
    """Returns the keys that decide a column by design."""
    if name.startswith(NO_OWNER):
        return ()
    return next((keys for begins, keys in OWNERS.items() if name.startswith(begins)), ())
