"""Published figures beside ours. They lie in published.csv, one a line; a file of the same columns adds others.

Ours and theirs are matched by backbone, data set and method under the names below. What differs between the settings of
our runs and the published protocol is listed with each line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
from s2a_cli.results import pivot, vtab
from s2a_cli.results.formats import Sheet, number
from s2a_cli.results.pivot import Grid

SHIPPED = Path(__file__).parent / "published.csv"
COLUMNS = ["source", "protocol", "backbone", "dataset", "method", "metric", "value", "unit", "note"]
BACKBONES = {
    "vit_b": "vit_b16_in21k",
    "swin_b": "swin_b_in21k",
    "convnext_b": "convnext_b_in21k",
    "resnet50": "resnet50_in1k",
}
METHODS = {"bias": "bitfit"}
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
    "FGVC": {"config.backbone.image_size": 224, "config.optim.epochs": 100},
}
SAME = {"config.quant.name": "none", "config.precision": "fp32"}  # what no source quantises or says otherwise


def load(path: str) -> pd.DataFrame:
    """The shipped figures (`published`), or those and a user's file. Raises UserError for one that does not fit."""
    shipped = pd.read_csv(SHIPPED)
    if path == "published":
        return shipped
    try:
        added = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"against={path}: can't be read ({error}); expected published or a .csv file") from None
    if missing := [c for c in COLUMNS if c not in added]:
        raise UserError(f"against={path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    odd = pd.to_numeric(added["value"], errors="coerce").isna()
    if odd.any():
        raise UserError(
            f"against={path}: line {int(odd.idxmax()) + 2}: value={added['value'][odd.idxmax()]}: expected a number"
        )
    return pd.concat([added[COLUMNS], shipped], ignore_index=True)


def compare(grid: Grid, published: pd.DataFrame) -> tuple[Sheet | None, list[str]]:
    """A line for each cell with a published figure: ours, theirs, the difference, what differs in the settings.

    None where no figure fits. Raises UserError for a value that no source has.
    """
    name = next(k for k, v in pivot.VALUES.items() if v is grid.value)
    if name not in METRICS:
        raise UserError(f"value={name}: published figures are there for {', '.join(METRICS)}")
    metric, unit = METRICS[name]
    published = published[(published["metric"] == metric) & (published["unit"] == unit)]
    records, sources = [], []
    for ours, value, runs in [*_cells(grid), *_vtab_means(grid)]:
        for line in published[_fits(published, ours, runs)].itertuples():
            if line.source not in sources:
                sources.append(line.source)
            records.append(
                ours
                | {
                    "ours": number(value, grid.value.digits),
                    "n": str(len(runs)),
                    "published": number(line.value, grid.value.digits),
                    "difference": f"{value - line.value:+.{grid.value.digits}f}",
                    "protocol": f"{line.protocol} [{sources.index(line.source) + 1}]",
                    "ours differs in": "; ".join(_differs(runs, line)) or "nothing that is recorded",
                }
            )
    if not records:
        runs = grid.runs
        there = sorted(
            {f"{b}, {d}, {m}" for b, d, m in zip(runs["backbone"], runs["dataset"], runs["method"], strict=True)}
        )
        return None, [f"No published figure fits: {listed(there, 4)}."]
    text = pd.DataFrame(records)
    notes = [f"{grid.value.title}: ours less published. A difference in the settings makes it no reproduction."]
    cited = [f"[{number_of}] {source}" for number_of, source in enumerate(sources, 1)]
    return Sheet(text, {"ours", "n", "published", "difference"}, title="Against published figures"), notes + cited


def _cells(grid: Grid) -> Iterator[tuple[dict[str, str], float, pd.DataFrame]]:
    """(labels, our figure, its runs) of each cell, of a single backbone, data set and method."""
    runs = grid.runs[grid.runs["value"].notna()]
    keys = list(dict.fromkeys([*grid.rows, *grid.cols, "backbone", "dataset", "method"]))
    for labels, cell in sorted(runs.groupby(keys), key=lambda item: pivot._order(item[0])):
        yield dict(zip(keys, labels, strict=True)), cell["value"].mean(), cell


def _vtab_means(grid: Grid) -> Iterator[tuple[dict[str, str], float, pd.DataFrame]]:
    """The same for the means over VTAB-1k's groups, where all of their tasks are there."""
    for mean in grid.means:
        name = VTAB_MEANS.get(frozenset(task.removeprefix("vtab_") for task in mean.datasets), {}).get(len(mean.groups))
        for line in grid.lines() if name else []:
            runs = grid.runs[grid.runs["value"].notna() & grid.runs["dataset"].isin(mean.datasets)]
            for key, label in zip(grid.rows, line, strict=True):
                runs = runs[runs[key] == label]
            value = pivot.mean_of(grid, line, mean)
            if pd.notna(value) and runs["backbone"].nunique() == runs["method"].nunique() == 1:
                labels = dict(zip(grid.rows, line, strict=True)) | {"dataset": name}
                yield labels | {key: runs[key].iloc[0] for key in ("backbone", "method")}, value, runs


def _fits(published: pd.DataFrame, ours: dict[str, str], runs: pd.DataFrame) -> pd.Series:
    """VTAB-1k's figures are for 1,000 training images: a whole data set of the same name is another task."""
    backbone, dataset, method = ours["backbone"], ours["dataset"], ours["method"]
    images = (pd.to_numeric(runs["data.train"]) + pd.to_numeric(runs["data.val"])).unique()
    names = [dataset]
    if list(images) == [VTAB_IMAGES]:
        names = [dataset if dataset.startswith("vtab_") else f"vtab_{dataset}"]
    return (
        published["backbone"].isin([backbone, BACKBONES.get(backbone)])
        & published["dataset"].isin(names)
        & published["method"].isin([method, METHODS.get(method)])
    )


def _differs(runs: pd.DataFrame, line) -> list[str]:
    """Settings of our runs that are not the published ones."""
    wanted = SAME | PROTOCOLS.get(line.protocol, {})
    wanted |= {"config.backbone.timm": WEIGHTS[line.backbone]} if line.backbone in WEIGHTS else {}
    said = []
    for column, right in wanted.items():
        values = [pivot.label(value) for value in runs["quant" if column == "config.quant.name" else column].unique()]
        if column.endswith("image_size"):
            values = [str(right) if value == "null" else value for value in values]  # timm's own size of these models
        if values != [str(right)]:
            said.append(f"{column.removeprefix('config.')} {', '.join(values)} (published: {right})")
    if line.protocol == "VTAB-1k" and not str(runs["dataset"].iloc[0]).startswith("vtab_"):
        said.append("training images: 1,000, not the benchmark's own")
    return said
