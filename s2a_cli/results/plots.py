"""Figures of results: accuracy against memory or parameters with the frontier, and learning curves."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.lines import Line2D

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import natural
from s2a_cli.results import made_files
from s2a_cli.results.frames import column, grouped, groups_of, where
from s2a_cli.results.looks import COLORS, Looks
from s2a_cli.results.summary import scored

GREY = "#808080"
INK = "#010203"  # text and axes; in a page it becomes the page's own colour
PANELS = 12
AXES = {"peak_mib": "peak MiB", "trainable": "trainable M, head apart"}
STYLE: Any = {  # of matplotlib.rc_context
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # a name may hold any number of $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "s2a",
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def frontier(points: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Returns the points to which no other is as cheap and better, or as good and cheaper, by rising cost."""
    ordered = points.sort_values([cost, "score_mean"], ascending=[True, False])
    top1 = column(ordered, "score_mean")
    return where(ordered, top1 > top1.cummax().shift(fill_value=float("-inf")))


def panels(rows: pd.DataFrame, cost: str) -> list[tuple[str, pd.DataFrame]]:
    """Returns (title, points) for each backbone and data set with two finished settings or more, the fullest first."""
    rows = scored(rows)
    points = where(rows, rows["score_mean"].notna() & rows[cost].notna() & (rows["n"] > 0))
    groups = groups_of(points, ["backbone", "dataset"])
    found = [(" · ".join(names), group) for names, group in groups if len(group) > 1]
    return sorted(found, key=lambda panel: (-len(panel[1]), natural(panel[0])))


@dataclass(frozen=True)
class Panels:
    """Figures of a panel each, by their titles, and the marks of the legend that they share."""

    figures: list[tuple[str, plt.Figure]]
    legend: list[Line2D]


def looks_of(rows: pd.DataFrame) -> Looks:
    """Returns how the methods and quants of these rows look."""
    return Looks.of(column(rows, "method"), column(rows, "quant"))


def pareto(rows: pd.DataFrame, cost: str) -> tuple[plt.Figure | None, str]:
    """Returns test top-1, or mAP, against `cost`, a panel a backbone and data set, and a line on what is left out.

    The figure is None where there is nothing to draw. Measured peaks are filled marks and a solid frontier, predicted
    ones hollow and dashed.
    """
    chosen, legend, said = _chosen(rows, cost, looks_of(rows))
    if not chosen:
        return None, said
    figure, axes = _canvas(len(chosen))
    for axis, (title, draw) in zip(axes, chosen, strict=False):
        draw(axis)
        axis.set_title(title)
    _legend(figure, legend)
    return figure, said


def pareto_panels(rows: pd.DataFrame, cost: str, looks: Looks) -> tuple[Panels, str]:
    """Returns what `pareto` draws, each panel as a figure, and the line on what is left out."""
    chosen, legend, said = _chosen(rows, cost, looks)
    return Panels([(title, _alone(draw)) for title, draw in chosen], legend), said


Draw = Callable[[plt.Axes], None]


def _chosen(rows: pd.DataFrame, cost: str, looks: Looks) -> tuple[list[tuple[str, Draw]], list[Line2D], str]:
    """Returns (title, what draws it) of each panel, the legend, and a line on what is left out."""
    found = panels(rows, cost)
    if not found:
        return [], [], "No backbone and data set has two finished settings."
    chosen = found[:PANELS]
    points = pd.concat([group for _, group in chosen])
    methods, quants = (sorted(set(column(points, name))) for name in ("method", "quant"))

    def draw(group: pd.DataFrame, axis: plt.Axes) -> None:
        _draw_points(axis, group, cost, looks)
        _scale_costs(axis, [value * _unit(cost) for value in group[cost]])
        axis.set(xlabel=AXES[cost], ylabel=f"test {group['metric'].iloc[0]} %")

    handles = [Line2D([], [], ls="", label=name, **looks.mark(name)) for name in methods]
    if len(looks.quants) > 1:
        handles += [Line2D([], [], color=GREY, marker=looks.shape(name), ls="", label=name) for name in quants]
    kinds = set(points["memory"]) if cost == "peak_mib" else set()
    if "measured" in kinds:
        handles.append(Line2D([], [], color=GREY, marker="o", label="measured"))
    if "predicted" in kinds:
        handles.append(Line2D([], [], color=GREY, marker="o", mfc="none", ls="--", label="predicted"))
    left = f" The {PANELS} of {len(found)} panels with the most settings." if len(found) > PANELS else ""
    said = (
        "Lines: the frontier, no other setting is better at less. Bars: standard deviation over seeds. In what else the"
        f" points differ, the table of settings says.{left}"
    )
    return [(title, functools.partial(draw, group)) for title, group in chosen], handles, said


def _unit(cost: str) -> float:
    return 1e-6 if cost == "trainable" else 1.0


def _draw_points(axis: plt.Axes, points: pd.DataFrame, cost: str, looks: Looks) -> None:
    """Draws the points of a panel and their frontier, measured and predicted ones apart where cost is a peak."""
    scale = _unit(cost)
    kinds = points["memory"].fillna("predicted") if cost == "peak_mib" else points["n"] * 0
    for kind, part in grouped(points, kinds):
        measured = kind != "predicted"
        edge = frontier(part, cost)
        along = [*edge[cost] * scale, points[cost].max() * scale]  # on to the right: dearer settings are below it
        axis.step(
            along,
            [*edge["score_mean"], edge["score_mean"].max()],
            where="post",
            color=GREY,
            lw=1.2,
            ls="-" if measured else "--",
            zorder=1,
        )
        for row in part.to_dict("records"):
            axis.errorbar(
                row[cost] * scale,
                row["score_mean"],
                yerr=row["score_std"] if row["n"] > 1 else None,
                ls="",
                **looks.mark(row["method"], row["quant"]),
                mfc=looks.color(row["method"]) if measured else "none",
                elinewidth=0.7,
                alpha=0.9,
                zorder=2,
            )


def _scale_costs(axis: plt.Axes, costs: list[float]) -> None:
    """Makes the axis of costs logarithmic where they span much, and labels it in plain figures."""
    low, high = min(costs), max(costs)
    least = min((value for value in costs if value > 0), default=0.0)
    steps = (1, 2, 5) if least and high / least < 200 else (1,)
    if low > 0 and high / low > 4:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
    elif low == 0 and high > 0:  # the linear probe trains nothing beside the head
        axis.set_xscale("symlog", linthresh=least, linscale=0.7)
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps if least <= step * 10.0**power <= high]
        axis.xaxis.set_major_locator(ticker.FixedLocator([0, *(found or [least])]))  # below `least` it is linear
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())


Lines = list[tuple[str, str, pd.DataFrame]]  # (method, quant, frame of epoch and score)


def curves(found: list[tuple[str, str, Lines]], looks: Looks) -> Panels:
    """Returns scores on validation by epoch of [(panel's title, what they are, its lines)]."""

    def draw(metric: str, lines: Lines, axis: plt.Axes) -> None:
        for method, quant, points in lines:
            _line(axis, points, "score", ls=looks.dashes(quant), **looks.mark(method, quant))
        _by_epoch(axis, metric)

    pairs = sorted({(method, quant) for *_, lines in found for method, quant, _ in lines})
    legend = [
        Line2D([], [], ls=looks.dashes(quant), label=f"{method} {quant}", **looks.mark(method, quant))
        for method, quant in pairs
    ]
    return Panels([(title, _alone(functools.partial(draw, metric, lines))) for title, metric, lines in found], legend)


def run_curves(lines: pd.DataFrame, best_epoch: int | None) -> Panels:
    """Returns the losses and the scores on validation of one run by epoch, a panel each, and marks its best epoch.

    lines: epoch, train_loss, val_loss, and those of val_top1, val_balanced and val_map that the run has.
    """
    losses = {"train_loss": "training loss", "val_loss": "validation loss"}
    scores = {
        "val_top1": "top-1 on validation",
        "val_balanced": "balanced accuracy on validation",
        "val_map": "mAP on validation",
    }
    color = dict(zip([*losses, *scores], COLORS, strict=False))

    def dashes(name: str) -> str:
        return "--" if name == "val_balanced" else "-"  # which is top-1 where all classes have as many images

    def draw(names: list[str], unit: str, axis: plt.Axes) -> None:
        for name in names:
            _line(axis, lines, name, color=color[name], ls=dashes(name), marker="." if len(lines) < 3 else "")
        if best_epoch is not None:
            axis.axvline(best_epoch, color=GREY, lw=1, ls=":")
        _by_epoch(axis, unit)

    figures, legend = [], []
    for title, names, unit in (("Loss", losses, "mean loss"), ("On validation", scores, "%")):
        if shown := [name for name in names if name in lines and lines[name].notna().to_numpy().any()]:
            figures.append((title, _alone(functools.partial(draw, shown, unit))))
            legend += [Line2D([], [], color=color[name], ls=dashes(name), label=names[name]) for name in shown]
    if best_epoch is not None:
        legend.append(Line2D([], [], color=GREY, lw=1, ls=":", label=f"the best epoch, {best_epoch}"))
    return Panels(figures, legend)


def _line(axis: plt.Axes, points: pd.DataFrame, name: str, **look: Any) -> None:
    """Draws a column by epoch; a mark stands at the end of a line, and at each point of a short one."""
    every = None if len(points) < 3 else [len(points) - 1]
    axis.plot(column(points, "epoch"), column(points, name), lw=1.6, markevery=every, **look)


def _by_epoch(axis: plt.Axes, label: str) -> None:
    axis.set(xlabel="epoch", ylabel=label)
    first, last = axis.dataLim.intervalx
    if first == last:  # an axis around a single epoch would be labelled with fractions of one
        axis.set_xlim(first - 1, last + 1)
        axis.set_xticks([first])
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))


def _alone(draw: Draw) -> plt.Figure:
    """Returns a figure of one panel, of a size that is readable on a phone."""
    figure, axis = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
    draw(axis)
    return figure


def swatch(handle: Line2D, name: str) -> str:
    """Returns the mark of a legend's entry as a small <svg> element."""
    figure = plt.figure(figsize=(0.42, 0.2))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.axis("off")
    mark = Line2D([0.1, 0.5, 0.9], [0.5] * 3, markevery=[1])
    mark.update_from(handle)
    mark.set_markevery([1])
    mark.set_transform(axis.transAxes)
    axis.add_line(mark)
    return svg(figure, name)


def svg(figure: plt.Figure, name: str) -> str:
    """Returns the figure as an <svg> element that takes the colour of the text around it.

    name: keeps its ids apart from those of others.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    found = text.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL).replace(
        INK, "currentColor"
    )
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", found)


def save(rows: pd.DataFrame, path: Path, force: bool = False) -> None:
    """Writes accuracy against peak memory as a file.

    A file that is no figure of ours is overwritten by `force` only. Raises UserError for a format that matplotlib can't
    write, and where there are no points.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in made_files.MAKER:
        raise UserError(f"figure={path}: expected a file that ends in .svg, .png or .pdf")
    with plt.rc_context(STYLE):
        figure, said = pareto(rows, "peak_mib")
        if figure is None:
            raise UserError(f"figure={path}: nothing to draw. {said}")
        data = io.BytesIO()
        figure.savefig(
            data,
            format=kind,
            bbox_inches="tight",
            facecolor="white",
            dpi=160,
            metadata={made_files.MAKER[kind]: made_files.MADE_BY},
        )
        plt.close(figure)
    made_files.save(path, data.getvalue(), "figure", force)


def _canvas(count: int) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(4.6, 3.6 * columns), 3.0 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat)[:count]


def _legend(figure: plt.Figure, handles: list[Line2D]) -> None:
    """Adds a legend below the panels, of as many columns as fit the figure."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    fitting = int(72 * figure.get_figwidth() / (5.5 * longest + 36))  # points; letters of 9 points are 5.5 wide
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(6, len(handles), fitting)))
