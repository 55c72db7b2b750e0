"""Draws predictions: live memory over one step with the peak marked, and bars of what is alive at the peak."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from s2a_cli.common.errors import UserError
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.result import MIB
from s2a_cli.memory.watch import NAMES, USES
from s2a_cli.planner.report import Prediction, Row
from s2a_cli.results import made_files

# Cold for what stays between steps, warm for what a step needs.
COLORS = {
    "weights": "#4a5a78",
    "trainable": "#7b8fb8",
    "optimiser": "#a9b8d6",
    "buffers": "#ccd4e4",
    "gradients": "#7f5aa2",
    "batch": "#9a9a9a",
    "kept": "#e0883c",
    "transient": "#f2c94c",
}
POINTS = 1500  # of a timeline
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "s2a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.axisbelow": True,
}


def save(rows: list[Row], path: Path, force: bool = False) -> None:
    """Draws one composition as a timeline beside bars, several as bars, and writes the figure to a file.

    A file that is no figure of s2a is overwritten by `force` only. Raises UserError where nothing can be drawn or
    written.
    """
    drawn = [(row, row.predicted) for row in rows if row.predicted]
    if not drawn:
        raise UserError(f"figure={path}: nothing to draw; none of the compositions can be predicted")
    with plt.rc_context(STYLE):
        figure = single(*drawn[0]) if len(rows) == 1 else several(drawn)
        data = io.BytesIO()
        kind = path.suffix.removeprefix(".")
        made = {made_files.MAKER[kind]: made_files.MADE_BY} | ({"Date": None} if kind == "svg" else {})
        figure.savefig(data, format=kind, dpi=160, metadata=made)
        plt.close(figure)
    made_files.save(path, data.getvalue(), "figure", force)


def single(row: Row, predicted: Prediction) -> Figure:
    """Draws a composition: its timeline, and bars beside those of full fine-tuning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), width_ratios=(2.6, 1), layout="constrained")
    _timeline(left, predicted.profile)
    _bars(right, ["this run", "full\nfine-tuning"], [predicted.profile, predicted.full])
    right.set_title("alive at the peak")
    right.set_ylabel("MiB, predicted")
    figure.suptitle(row.composition.title, x=0.012, ha="left", fontsize=11)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[use]) for use in USES]
    figure.legend(handles, [NAMES[use] for use in USES], loc="outside lower center", ncols=4)


def several(rows: list[tuple[Row, Prediction]]) -> Figure:
    """Draws a bar for each composition."""
    height = 1.5 + 0.34 * len(rows)
    figure, axis = plt.subplots(figsize=(9, height), layout="constrained")
    _bars(axis, [row.name for row, _ in rows], [predicted.profile for _, predicted in rows], across=True)
    axis.invert_yaxis()
    axis.set_xlabel("MiB alive at the peak, predicted")
    _legend(figure)
    return figure


def live(profile: Profile) -> np.ndarray:
    """Returns the MiB alive after each entry of the timeline from the start of the step on: [entries + 1, uses]."""
    changes = np.zeros((len(profile.timeline) - profile.begins_at + 1, len(USES)))
    for at, (number, bytes) in enumerate(profile.timeline):
        changes[max(0, at - profile.begins_at + 1), USES.index(profile.uses[number])] += bytes
    return changes.cumsum(0) / MIB


def _timeline(axis: Axes, profile: Profile) -> None:
    """Draws the live memory of a step, with its phases and its peak."""
    values = live(profile)
    total, peak = values.sum(1), profile.peak_at - profile.begins_at
    edges = np.linspace(0, len(total), min(POINTS, len(total)) + 1).astype(int)
    kept = [start + int(total[start:stop].argmax()) for start, stop in pairwise(edges)]  # no peak gets lost
    axis.stackplot(kept, values[kept].T, colors=[COLORS[use] for use in USES], lw=0)
    axis.plot(kept, total[kept], color="#333333", lw=0.6)
    top = profile.peak_bytes / MIB
    axis.plot([peak], [top], "o", ms=5, color="#c0392b", zorder=3)
    late = peak > 0.6 * len(total)
    axis.annotate(
        f"peak {top:,.0f} MiB\n{profile.place}, {profile.phase}",
        (peak, top),
        (-9 if late else 9, 4),
        textcoords="offset points",
        ha="right" if late else "left",
        va="bottom",
        color="#c0392b",
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )
    axis.set(xlim=(0, len(total) - 1), ylim=(0, top * 1.25), ylabel="MiB alive, predicted")
    starts = [max(0, at - profile.begins_at) for at, _ in profile.phases]
    for (_, name), start, end in zip(profile.phases, starts, [*starts[1:], len(total) - 1], strict=True):
        if start > 0.01 * len(total):
            axis.axvline(start, color="#333333", lw=0.7, ls=(0, (4, 3)))
        if end - start > 0.05 * len(total):
            axis.text((start + end) / 2, top * 1.23, name, ha="center", va="top", color="#555555")
    axis.set_title("over one training step")
    axis.set_xlabel("allocations and releases, in order")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_formatter("{x:,.0f}")


def _bars(axis: Axes, names: list[str], profiles: list[Profile], across: bool = False) -> None:
    """Draws bars of what is alive at the peak, by use; across: from left to right."""
    ends = np.zeros(len(names))
    for use in USES:
        sizes = np.array([profile.by("use").get((use,), 0) / MIB for profile in profiles])
        if across:
            axis.barh(range(len(names)), sizes, 0.68, left=ends, color=COLORS[use])
        else:
            axis.bar(range(len(names)), sizes, 0.68, bottom=ends, color=COLORS[use])
        ends += sizes
    for place, end in enumerate(ends):
        text, shift = f"{end:,.0f}", (4, 0) if across else (0, 3)
        axis.annotate(
            text,
            (end, place) if across else (place, end),
            shift,
            textcoords="offset points",
            ha="left" if across else "center",
            va="center" if across else "bottom",
        )
    numbers = axis.xaxis if across else axis.yaxis
    (axis.set_yticks if across else axis.set_xticks)(range(len(names)), names)
    (axis.set_xlim if across else axis.set_ylim)(0, ends.max() * 1.12)
    numbers.set_major_formatter("{x:,.0f}")
    numbers.grid(True, color="#808080", alpha=0.25)
    axis.tick_params(axis="y" if across else "x", length=0)
