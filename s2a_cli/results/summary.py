"""From result.json files to tables: one row a setting, over its seeds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line, printable
from s2a_cli.results import record, run_folder
from s2a_cli.results.formats import Sheet, as_csv, cell, checked, mib, number
from s2a_cli.results.formats import render as render_sheets
from s2a_cli.results.record import NOT_IDENTITY

# Runs that differ in these alone share a row. method.lr and lr_scale but make the default of optim.lr.
SHARED = {f"config.{key}" for key in (*NOT_IDENTITY, "seed", "method.lr", "backbone.lr_scale", "dataset.name")}
BASE = ["dataset", "backbone", "method", "quant"]
NAMES = dict(zip(["data.name", "config.backbone.name", "config.method.name", "config.quant.name"], BASE, strict=True))
KINDS = {"measured-cuda": "measured", "predicted": "predicted"}
NUMBERS = {
    "top1": "accuracy.test_top1",  # %
    "trainable": "parameters.trainable",  # head apart
    "percent": "parameters.percent",  # of the backbone, head apart
    "peak_mib": "memory.peak_mib",
    "full_peak_mib": "memory.full_finetune_peak_mib",
    "images_per_s": "throughput.train_images_per_second",
}
# What full fine-tuning must share with a run for their measured peaks to be comparable.
SAME_STEP = ["dataset", "backbone", "config.backbone.image_size", "config.optim.name", "config.optim.momentum"]
SAME_STEP += ["config.optim.batch_size", "config.optim.micro_batch", "config.precision", "environment.device"]
NOTES = (
    "top-1: %, test, mean ± standard deviation over n runs. trainable: M and % of the backbone, head apart.",
    "peak: MiB, memory of a training step. x: full fine-tuning's peak / this peak. images/s: training, images loaded.",
)
RIGHT = {"top-1 %", "n", "trainable M", "%", "peak MiB", "x", "images/s", "mean of top-1 %"}
PREDICTED_FULL = "*: measured, against full fine-tuning's predicted peak; to measure that, run method=full quant=none."


def load(places: Iterable[str | Path]) -> pd.DataFrame:
    """One row for each result.json below the `places`, with dotted columns ("config.optim.lr", "accuracy.test_top1",
    ...).

    Files that can't be read are named on stderr and left out. Raises UserError when a folder or every run is missing.
    """
    found, odd = read(places)
    tell(odd, f"of {len(odd) + len(found)} results")
    if found.empty:
        raise UserError(f"no finished runs below {', '.join(map(str, places))}; make one with: s2a train")
    return found


def tell(odd: list[str], of: str = "files") -> None:
    """Names on stderr the files that were left out."""
    if odd:
        print(f"s2a: {len(odd)} {of} can't be read, left out:", *odd, sep="\n  ", file=sys.stderr)


def read(places: Iterable[str | Path]) -> tuple[pd.DataFrame, list[str]]:
    """As `load`, and a line for each file that can't be read; the status of a run that is at work is "running".

    Raises UserError when a folder is missing.
    """
    for folder in map(Path, places):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give folders that hold runs")
    paths = {os.path.realpath(path) for folder in places for path in _results(folder)}
    results, odd = [], []
    for path in sorted(paths):
        try:
            result = record.load(path)
        except (OSError, ValueError) as error:
            odd.append(printable(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}"))
            continue
        if result["status"] == "interrupted" and run_folder.at_work(Path(path).parent):
            result |= {"status": "running", "error": None}
        results.append(flat(result) | {"path": path})
    return pd.DataFrame(results), odd


def frame(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The same rows from results at hand."""
    return pd.DataFrame([flat(result) for result in results])


def _results(folder: str | Path) -> Iterable[str]:
    for parent, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if name != run_folder.NEXT]  # what may once replace the run in `parent`
        if run_folder.RECORD in files:
            yield os.path.join(parent, run_folder.RECORD)


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """A result with dotted keys; lists as JSON text, control characters in texts as escapes.

    Raises KeyError without the keys that every result has.
    """
    columns: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                text = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
                columns[printable(f"{prefix}{key}")] = printable(text) if isinstance(text, str) else text

    walk(result, "")
    for key in ("id", "status", *NAMES):
        if columns.get(key) is None:
            raise KeyError(key)
    return {key: value for key, value in columns.items() if key not in BASE}  # an early record had a key "quant"


def unique(frame: pd.DataFrame) -> pd.DataFrame:
    """Each run once, a copy is not another run; the columns of BASE under these names; no column of NUMBERS missing."""
    optional = [*NUMBERS.values(), *SAME_STEP[2:], "memory.kind", "memory.full_finetune_kind"]
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, *optional])))
    return frame.drop_duplicates(["id", "status", "memory.kind"]).rename(columns=NAMES).reset_index(drop=True)


def settings_of(frame: pd.DataFrame) -> list[str]:
    """The columns that decide what a run computes, seeds apart."""
    return [c for c in frame if (c.startswith("config.") and c not in SHARED) or c in ("data.revision", "weights")]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting, over its seeds; numbers, not text.

    Columns: dataset, backbone, method, quant, then the settings in which rows differ, n (ok runs), status, top1_mean
    and top1_std (%), trainable and percent (head apart), peak_mib, memory (measured | predicted), x_full,
    x_full_against (measured | predicted), images_per_s. Measured and predicted peaks never share a row; a measured
    peak and a speed are left empty when the runs of a row come from several devices.
    """
    frame = unique(frame)
    settings = settings_of(frame)
    ok = frame["status"] == "ok"
    setting = pd.Series(map("\x1f".join, text_of(frame[BASE + settings]).itertuples(index=False)), frame.index)
    kinds = frame["memory.kind"].astype(object).where(ok).map(KINDS)
    frame["memory"] = kinds.where(kinds.notna(), kinds.groupby(setting).transform("first"))  # failed runs join others
    row = setting + "\x1f" + text_of(frame["memory"])

    groups = frame.groupby(row, sort=False)
    rows = groups[[*BASE, *settings, "memory", "environment.device", "memory.full_finetune_kind"]].first()
    rows["n"] = ok.groupby(row, sort=False).sum()
    rows["status"] = groups["status"].agg(status_of)
    numbers = frame[list(NUMBERS.values())].apply(pd.to_numeric).where(ok)
    finished = numbers.groupby(row, sort=False)
    for name, column in NUMBERS.items():
        rows[name] = finished[column].mean()
    rows["top1_std"] = finished[NUMBERS["top1"]].std()
    several = groups["environment.device"].nunique() > 1
    rows.loc[several, "images_per_s"] = None
    rows.loc[several & (rows["memory"] == "measured"), "peak_mib"] = None
    rows = _against_full(rows.reset_index(drop=True), settings).rename(columns={"top1": "top1_mean"})

    extra = _distinguishing(rows, settings)
    rows = rows.sort_values(BASE + extra, key=text_of, ignore_index=True)
    columns = [*BASE, *extra, "n", "status", "top1_mean", "top1_std", "trainable", "percent", "peak_mib", "memory"]
    rows = rows[[*columns, "x_full", "x_full_against", "images_per_s"]]
    return rows.rename(columns={name: name.removeprefix("config.") for name in extra})


def text_of(values: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """Every value as text; a missing one, whatever pandas holds for it, as an empty text."""
    return values.map(lambda value: "" if pd.isna(value) else str(value))


def status_of(status: pd.Series) -> str:
    """ok, or how many runs ended how: "2 ok, 1 oom"."""
    counts = status.value_counts().sort_index(key=lambda index: index != "ok")
    return "ok" if list(counts.index) == ["ok"] else ", ".join(f"{n} {name}" for name, n in counts.items())


def _against_full(rows: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Adds x_full and x_full_against: a peak against full fine-tuning's, of the same kind wherever there is one."""
    bits = [c for c in settings if c.startswith("config.quant.") and c != "config.quant.group"]
    exact = rows[bits].isna().all(axis=1)
    full = rows[(rows["method"] == "full") & (rows["memory"] == "measured") & exact].drop_duplicates(SAME_STEP)
    full = full[[*SAME_STEP, "peak_mib"]].rename(columns={"peak_mib": "measured"})
    measured = rows.merge(full, on=SAME_STEP, how="left")["measured"]
    use = (rows["memory"] == "measured") & measured.notna()
    rows["x_full"] = measured.where(use, rows["full_peak_mib"]) / rows["peak_mib"]
    rows["x_full_against"] = rows["memory.full_finetune_kind"].map(KINDS).mask(use, "measured")
    return rows


def times_less(runs: pd.DataFrame) -> pd.Series:
    """Of each run: full fine-tuning's peak / its peak, the former of the same kind wherever there is one."""
    runs = runs.rename(columns={column: name for name, column in NUMBERS.items()})
    runs = runs.assign(memory=runs["memory.kind"].map(KINDS))
    return _against_full(runs, settings_of(runs))["x_full"]


def _distinguishing(rows: pd.DataFrame, settings: list[str]) -> list[str]:
    """The settings that a reader must see: without them two rows look alike, or unlike runs are compared.

    A method's own settings, bits and learning rate differ between methods by design, and count only between rows of the
    same method and quant.
    """

    def differ(columns: list[str], within: list[str]) -> list[str]:
        found = [c for c in columns if rows[c].nunique(dropna=False) > 1]
        if not found:
            return []
        counts = text_of(rows[found]).groupby([rows[c] for c in within], sort=False).nunique()
        return [c for c in found if (counts[c] > 1).any()]

    own = [c for c in settings if c.startswith(("config.method.", "config.quant.")) or c == "config.optim.lr"]
    shown = differ([c for c in settings if c not in own], ["dataset", "backbone"]) + differ(own, BASE)
    families = [c for c in shown if c.startswith("config.quant.") and c != "config.quant.bits"]
    follow = [c for c in families if text_of(rows[c]).equals(text_of(rows["config.quant.bits"]))]  # the bits of all
    shown = [c for c in shown if c not in follow]
    return sorted(shown, key=settings.index)


def pivot(rows: pd.DataFrame) -> pd.DataFrame | None:
    """Method x dataset of top-1 texts with the mean over all datasets; None for a single dataset."""
    datasets = sorted(rows["dataset"].unique())
    if len(datasets) < 2:
        return None
    index = [c for c in BASE if c != "dataset"]
    if rows.duplicated([*index, "dataset"]).any():  # several settings of a method on one dataset
        index += list(rows.columns[len(BASE) : rows.columns.get_loc("n")]) + ["memory"]
    text = rows.assign(text=_top1(rows), **{c: rows[c].map(cell) for c in index})
    wide = text.pivot_table(index=index, columns="dataset", values="text", aggfunc="first", sort=True)
    mean = text.pivot_table(index=index, columns="dataset", values="top1_mean", aggfunc="first", dropna=False)
    mean = mean.reindex(index=wide.index, columns=datasets).mean(axis=1, skipna=False)
    wide["mean"] = mean.map(lambda value: number(value, 2))
    return wide.fillna("–").reset_index().rename_axis(columns=None)


def _top1(rows: pd.DataFrame) -> list[str]:
    pairs = zip(rows["top1_mean"], rows["top1_std"], strict=True)
    return [number(mean, 2) + ("" if pd.isna(std) else f" ± {std:.2f}") for mean, std in pairs]


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` as text, units in the header."""
    extra = list(rows.columns[len(BASE) : rows.columns.get_loc("n")])
    text = rows[BASE + extra].map(cell)
    text["top-1 %"] = _top1(rows)
    text["n"] = rows["n"].astype(str)
    text["trainable M"] = [number(value / 1e6, 3) for value in rows["trainable"]]
    text["%"] = [number(value, 2) for value in rows["percent"]]
    text["peak MiB"] = [mib(value) for value in rows["peak_mib"]]
    text["memory"] = rows["memory"].fillna("–")
    same = rows["memory"] == rows["x_full_against"]
    text["x"] = [number(x, 2, "" if plain else "*") for x, plain in zip(rows["x_full"], same, strict=True)]
    text["images/s"] = [mib(value) for value in rows["images_per_s"]]
    if (rows["status"] != "ok").any():
        text["status"] = rows["status"]
    return text


def render(rows: pd.DataFrame, format: str = "terminal", notes: Iterable[str] = ()) -> str:
    """The rows of `table` in one of FORMATS, with the method x dataset table behind where there are several datasets.

    csv holds the plain numbers of `table`. `notes` are lines under it. Raises UserError for another format.
    """
    if checked(format) == "csv":
        return as_csv(rows)
    text, wide = readable(rows), pivot(rows)
    under = [*NOTES, *([PREDICTED_FULL] if text["x"].str.endswith("*").any() else []), *notes]
    texts = [text] if wide is None else [text, wide.rename(columns={"mean": "mean of top-1 %"})]
    return render_sheets([Sheet(text, RIGHT) for text in texts], under, format)
