"""Pictures of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from typing import IO, Any

import numpy as np

from s2a_cli.common.text import brief
from s2a_cli.results import made_files, plots
from s2a_cli.results.plots import plt

NAMED = 60  # classes whose names fit beside the matrix
NUMBERED = 15  # classes whose counts fit into the cells


def confusion(figures: dict[str, Any], title: str | None = None) -> plt.Figure:
    """Returns the confusion matrix, a row for each class that is; shades are shares of the row.

    title: by default the name of the data.
    """
    matrix, names = np.array(figures["confusion"]), [brief(name, 24) for name in figures["classes"]]
    size = min(12.0, max(3.6, 1.8 + 0.24 * len(names)))
    with plt.rc_context(plots.STYLE):
        figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.grid(False)
        axis.set(xlabel="said", ylabel="is", title=f"{figures['data']}: confusion matrix" if title is None else title)
        if len(names) <= NAMED:
            axis.set_xticks(range(len(names)), names, rotation=90)
            axis.set_yticks(range(len(names)), names)
        if len(names) <= NUMBERED:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    color = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def reliability(figures: dict[str, Any]) -> plt.Figure:
    """Returns accuracy against confidence, a bar a bin: a calibrated model's bars end at the diagonal."""
    bins = figures["calibration"]
    with plt.rc_context(plots.STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
        axis.plot([0, 100], [0, 100], color=plots.GREY, ls="--", lw=1)
        width = 100 / len(bins) if not bins else bins[0]["to"] - bins[0]["from"]
        lows, heights = [one["from"] for one in bins], [one["accuracy"] for one in bins]
        axis.bar(lows, heights, width=width, align="edge", color=plots.COLORS[0], edgecolor="white", lw=0.6)
        for one in bins:
            axis.text(one["from"] + width / 2, one["accuracy"] + 1, str(one["images"]), ha="center", fontsize=6.5)
        error = figures["expected_calibration_error_15_bins"]
        axis.set(xlim=(0, 100), ylim=(0, 105), xlabel="confidence %", ylabel="accuracy % (above: images)")
        axis.set_title(f"{figures['data']}: expected calibration error {error:.2f} %, 15 bins")
    return figure


def save(figure: plt.Figure, file: IO[bytes]) -> None:
    """Writes a figure as SVG, on white."""
    with plt.rc_context(plots.STYLE):
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": made_files.MADE_BY})
    plt.close(figure)
