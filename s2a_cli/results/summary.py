"""The table of settings: one row a setting, over its seeds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd

from s2a_cli.results.aggregate import (
    BASE,
    FIGURES,
    Differences,
    add_full_ratio,
    exact,
    memory_kinds,
    over_seeds,
    runs_of,
    settings_of,
)
from s2a_cli.results.formats import TextTable, as_csv, cell, check_format, mib, number
from s2a_cli.results.formats import render as render_tables
from s2a_cli.results.frames import column, columns, numeric

NOTES = (
    "top-1: %, test, mean ± standard deviation over n runs. trainable: M and % of the backbone, head apart.",
    "peak: MiB, memory of a training step. x: full fine-tuning's peak / this peak. images/s: training, images loaded.",
)
RIGHT = {"top-1 %", "mAP %", "n", "trainable M", "%", "peak MiB", "x", "images/s", "mean of top-1 %"}
PREDICTED_FULL = "*: measured, against full fine-tuning's predicted peak; to measure that, run method=full quant=none."


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each setting, over its seeds; numbers, not text.

    Columns: dataset, backbone, method, quant, then the settings in which rows differ, n (ok runs), status, top1_mean
    and top1_std (%), map_mean and map_std (%) where images of a data set have several labels, trainable and percent
    (head apart), peak_mib, memory (measured | predicted), x_full, x_full_against (measured | predicted), images_per_s.
    Measured and predicted peaks never share a row; a measured peak and a speed are left empty when the runs of a row
    come from several devices.
    """
    runs = runs_of(frame)
    settings = settings_of(runs)
    ok = column(runs, "status") == "ok"
    setting = pd.Series(map("\x1f".join, columns(runs, BASE + settings).map(exact).itertuples(index=False)), runs.index)
    kinds = memory_kinds(runs).where(ok)
    runs["memory"] = kinds.where(kinds.notna(), kinds.groupby(setting).transform("first"))  # failed runs join others
    row = setting + "\x1f" + column(runs, "memory").map(exact)

    figures = pd.DataFrame({name: numeric(column(runs, c)).where(ok) for name, c in FIGURES.items()})
    found = over_seeds(figures.assign(ok=ok.astype(float).where(ok)), column(runs, "status"), [row])
    kept = columns(runs, [*BASE, *settings, "memory", "environment.device", "memory.full_finetune_kind"])
    groups = kept.groupby(row, sort=False)
    rows = groups.first()
    rows = rows.assign(n=found.n["ok"], status=found.status, **{name: found.mean[name] for name in FIGURES})
    rows["top1_std"], rows["map_std"] = found.std["top1"], found.std["map"]
    several = groups["environment.device"].nunique() > 1
    rows.loc[several, "images_per_s"] = None
    rows.loc[several & (rows["memory"] == "measured"), "peak_mib"] = None
    rows = add_full_ratio(rows.reset_index(drop=True), settings).rename(
        columns={"top1": "top1_mean", "map": "map_mean"}
    )

    extra = Differences(rows, BASE, exact).to_show()
    rows = rows.sort_values(BASE + extra, key=lambda values: values.map(exact), ignore_index=True)
    scores = ["top1_mean", "top1_std", *(["map_mean", "map_std"] if any(column(rows, "map_mean").notna()) else [])]
    shown = [*BASE, *extra, "n", "status", *scores, "trainable", "percent", "peak_mib", "memory"]
    rows = columns(rows, [*shown, "x_full", "x_full_against", "images_per_s"])
    return rows.rename(columns={name: name.removeprefix("config.") for name in extra})


def settings_shown(rows: pd.DataFrame) -> list[str]:
    """Returns the columns of `table` in which rows differ beside BASE."""
    names = list(rows)
    return names[len(BASE) : names.index("n")]


def by_dataset(rows: pd.DataFrame) -> pd.DataFrame | None:
    """Returns method x dataset of top-1 texts with the mean over all datasets; None for a single dataset.

    Where images of a data set have several labels, its texts are of mAP, and no mean is over it.
    """
    datasets = sorted(column(rows, "dataset").unique())
    if len(datasets) < 2:
        return None
    index = [c for c in BASE if c != "dataset"]
    if rows.duplicated([*index, "dataset"]).any():  # several settings of a method on one dataset
        index += [*settings_shown(rows), "memory"]
    text = rows.assign(text=_texts(scored(rows), "score"), **{c: column(rows, c).map(cell) for c in index})
    wide = text.pivot_table(index=index, columns="dataset", values="text", aggfunc="first", sort=True)
    mean = text.pivot_table(index=index, columns="dataset", values="top1_mean", aggfunc="first", dropna=False)
    mean = mean.reindex(index=wide.index, columns=datasets).mean(axis=1, skipna=False)
    wide["mean"] = [number(value, 2) for value in mean]
    return wide.fillna("–").reset_index().rename_axis(columns=None)


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of `table` with score_mean and score_std, in %, and metric: what they are, top-1 or mAP."""
    several = rows["map_mean"].notna() if "map_mean" in rows else pd.Series(False, rows.index)
    scores = {f"score_{of}": rows[f"top1_{of}"].where(~several, rows.get(f"map_{of}")) for of in ("mean", "std")}
    return rows.assign(**scores, metric=several.map(cast(Any, {True: "mAP", False: "top-1"})))


def _texts(rows: pd.DataFrame, name: str) -> list[str]:
    pairs = zip(rows[f"{name}_mean"], rows[f"{name}_std"], strict=True)
    return [number(mean, 2) + ("" if pd.isna(std) else f" ± {std:.2f}") for mean, std in pairs]


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of `table` as text, units in the header."""
    text = columns(rows, BASE + settings_shown(rows)).map(cell)
    for name, title in {"top1": "top-1 %", "map": "mAP %"}.items():
        if f"{name}_mean" in rows and (
            name == "map" or "map_mean" not in rows or any(column(rows, "top1_mean").notna())
        ):
            text[title] = _texts(rows, name)
    text["n"] = rows["n"].astype(str)
    text["trainable M"] = [number(value / 1e6, 3) for value in rows["trainable"]]
    text["%"] = [number(value, 2) for value in rows["percent"]]
    text["peak MiB"] = [mib(value) for value in rows["peak_mib"]]
    text["memory"] = rows["memory"].fillna("–")
    same = rows["memory"] == rows["x_full_against"]
    text["x"] = [number(x, 2, "" if plain else "*") for x, plain in zip(rows["x_full"], same, strict=True)]
    text["images/s"] = [mib(value) for value in rows["images_per_s"]]
    if any(status != "ok" for status in rows["status"]):
        text["status"] = rows["status"]
    return text


def render(rows: pd.DataFrame, format: str = "terminal", notes: Iterable[str] = ()) -> str:
    """Returns the rows of `table` in one of FORMATS, and method x dataset behind it where there are several datasets.

    csv holds the plain numbers of `table`. `notes` are lines under it. Raises UserError for another format.
    """
    if check_format(format) == "csv":
        return as_csv(rows)
    text, wide = readable(rows), by_dataset(rows)
    under = [*NOTES, *([PREDICTED_FULL] if any(x.endswith("*") for x in text["x"]) else []), *notes]
    texts = [text] if wide is None else [text, wide.rename(columns={"mean": "mean of top-1 %"})]
    return render_tables([TextTable(text, RIGHT) for text in texts], under, format)
