"""Published figures beside ours. They lie in published.csv, one a line; a file of the same columns adds others.

Ours and theirs are matched by backbone, data set and method under the names below. What differs between the settings of
our runs and the published protocol is listed with each line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
from s2a_cli.results import vtab
from s2a_cli.results.formats import TextTable, label, number
from s2a_cli.results.frames import column, columns, groups_of, numeric, where
from s2a_cli.results.pivot import Grid, order

SHIPPED = Path(__file__).parent / "published.csv"
COLUMNS = ["source", "protocol", "backbone", "dataset", "method", "metric", "value", "unit", "note"]
BACKBONES = {
    "vit_b": "vit_b16_in21k",
    "swin_b": "swin_b_in21k",
    "convnext_b": "convnext_b_in21k",
    "resnet50": "resnet50_in1k",
}
METHODS = {  # ours -> as sources call it
    "bias": "bitfit",
    "dtl_plus": "dtl+",
    "fact_tt": "fact",
    "partial": "partial1",
    "repadapter": "rep_adapter",
    "side_tuning": "sidetune",
}
SETTINGS = {"partial1": {"config.method.k": 1}}  # of a method there
METRICS = {"test_top1": ("top1", "%"), "trainable": ("trainable_params", "M")}
WEIGHTS = {  # published backbone: timm's model with these weights
    "vit_b16_in21k": "vit_base_patch16_224.orig_in21k",
    "swin_b_in21k": "swin_base_patch4_window7_224.ms_in22k",
    "convnext_b_in21k": "convnext_base.fb_in22k",
}
VTAB_IMAGES = 1000  # training images of every VTAB-1k task, validation included
EVERY = frozenset(task for tasks in vtab.VTAB.values() for task in tasks)
VTAB_MEANS = {
    frozenset(tasks): {1: f"vtab_{name}"} for name, tasks in vtab.VTAB.items()
}  # tasks: {groups: data set there}
VTAB_MEANS[EVERY] = {1: "vtab_mean19", len(vtab.VTAB): "vtab_group_mean"}
PROTOCOLS = {  # protocol: our settings that reproduce it
    "VTAB-1k": {"config.backbone.image_size": 224, "config.optim.epochs": 100},
    "VTAB-1k, tuned": {"config.backbone.image_size": 224, "config.optim.epochs": 100},  # each task, on 200 images
    "FGVC": {"config.backbone.image_size": 224, "config.optim.epochs": 100},
}
SAME = {"config.quant.name": "none", "config.precision": "fp32"}  # what no source quantises or says otherwise


def load(path: str) -> pd.DataFrame:
    """Returns the shipped figures (`published`), or those and a user's file. Raises UserError where it does not fit."""
    shipped = pd.read_csv(SHIPPED)
    if path == "published":
        return shipped
    try:
        added = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"against={path}: can't be read ({error}); expected published or a .csv file") from None
    if missing := [c for c in COLUMNS if c not in added]:
        raise UserError(f"against={path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    numbers = cast(pd.Series, pd.to_numeric(column(added, "value"), errors="coerce"))
    if numbers.isna().any():
        at = list(numbers.isna()).index(True)
        raise UserError(f"against={path}: line {at + 2}: value={added['value'].iloc[at]}: expected a number")
    return pd.concat([columns(added, COLUMNS), shipped], ignore_index=True)


def compare(grid: Grid, published: pd.DataFrame) -> tuple[TextTable | None, list[str]]:
    """Returns a line for each cell with a published figure: ours, theirs, the difference, what differs in the settings.

    None where no figure fits. Raises UserError for a value that no source has.
    """
    if grid.value.name not in METRICS:
        raise UserError(f"value={grid.value.name}: published figures are there for {', '.join(METRICS)}")
    metric, unit = METRICS[grid.value.name]
    published = where(published, (published["metric"] == metric) & (published["unit"] == unit))
    records: list[dict[str, str]] = []
    sources: list[str] = []
    for ours, value, runs in [*_cells(grid), *_vtab_means(grid)]:
        for line in where(published, _fits(published, ours, runs)).to_dict("records"):
            if line["source"] not in sources:
                sources.append(line["source"])
            records.append(
                ours
                | {
                    "ours": number(value, grid.value.digits),
                    "n": str(len(runs)),
                    "published": number(line["value"], grid.value.digits),
                    "difference": f"{value - line['value']:+.{grid.value.digits}f}",
                    "protocol": f"{line['protocol']} [{sources.index(line['source']) + 1}]",
                    "ours differs in": "; ".join(_differs(runs, line)) or "nothing that is recorded",
                }
            )
    if not records:
        names = columns(grid.runs, ["backbone", "dataset", "method"]).itertuples(index=False)
        return None, [f"No published figure fits: {listed(sorted({', '.join(name) for name in names}), 4)}."]
    text = pd.DataFrame(records)
    notes = [f"{grid.value.title}: ours less published. A difference in the settings makes it no reproduction."]
    cited = [f"[{number_of}] {source}" for number_of, source in enumerate(sources, 1)]
    return TextTable(text, {"ours", "n", "published", "difference"}, title="Against published figures"), notes + cited


def _cells(grid: Grid) -> Iterator[tuple[dict[str, str], float, pd.DataFrame]]:
    """Yields (labels, our figure, its runs) of each cell, of a single backbone, data set and method."""
    keys = list(dict.fromkeys([*grid.rows, *grid.cols, "backbone", "dataset", "method"]))
    for labels, runs in sorted(groups_of(grid.counted(), keys), key=lambda group: order(group[0])):
        yield dict(zip(keys, labels, strict=True)), column(runs, "value").mean(), runs


def _vtab_means(grid: Grid) -> Iterator[tuple[dict[str, str], float, pd.DataFrame]]:
    """Yields the same for the means over VTAB-1k's groups, where all of their tasks are there."""
    for mean in grid.means:
        name = VTAB_MEANS.get(frozenset(task.removeprefix("vtab_") for task in mean.datasets), {}).get(len(mean.groups))
        for line in grid.lines() if name else []:
            runs = grid.counted(line)
            runs = where(runs, runs["dataset"].isin(mean.datasets))
            value = grid.mean_of(line, mean)
            one = {key: set(runs[key]) for key in ("backbone", "method")}
            if value == value and all(len(names) == 1 for names in one.values()):
                labels = dict(zip(grid.rows, line, strict=True)) | {"dataset": str(name)}
                yield labels | {key: names.pop() for key, names in one.items()}, value, runs


def _fits(published: pd.DataFrame, ours: dict[str, str], runs: pd.DataFrame) -> pd.Series:
    """Returns which lines are of our backbone, data set and method.

    VTAB-1k's figures are for 1,000 training images: a whole data set of the same name is another task.
    """
    backbone, dataset, method = ours["backbone"], ours["dataset"], ours["method"]
    images = set(numeric(column(runs, "data.train")) + numeric(column(runs, "data.val")))
    names = [dataset]
    if images == {VTAB_IMAGES}:
        names = [dataset if dataset.startswith("vtab_") else f"vtab_{dataset}"]
    return (
        column(published, "backbone").isin([backbone, BACKBONES.get(backbone)])
        & column(published, "dataset").isin(names)
        & column(published, "method").isin([method, METHODS.get(method)])
    )


def _differs(runs: pd.DataFrame, line: dict[str, Any]) -> list[str]:
    """Returns the settings of our runs that are not those of a published line."""
    wanted = SAME | PROTOCOLS.get(line["protocol"], {}) | SETTINGS.get(line["method"], {})
    wanted |= {"config.backbone.timm": WEIGHTS[line["backbone"]]} if line["backbone"] in WEIGHTS else {}
    said = []
    for name, right in wanted.items():
        found = column(runs, "quant" if name == "config.quant.name" else name)
        values = [label(value) for value in found.unique()]
        if name.endswith("image_size"):
            values = [str(right) if value == "null" else value for value in values]  # timm's own size of these models
        if values != [str(right)]:
            said.append(f"{name.removeprefix('config.')} {', '.join(values)} (published: {right})")
    if line["protocol"].startswith("VTAB-1k") and not str(runs["dataset"].iloc[0]).startswith("vtab_"):
        said.append("training images: 1,000, not the benchmark's own")
    return said
