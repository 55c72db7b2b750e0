"""Pictures of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from typing import IO, Any

import numpy as np

from s2a_cli.common.text import brief
from s2a_cli.results import made_files, plots
from s2a_cli.results.plots import plt

NAMED = 60  # names that fit beside the matrix
CELLS = 400  # a side of the matrix that can still be told apart
NUMBERED = 15  # classes whose counts fit into the cells


def confusion(figures: dict[str, Any], title: str | None = None) -> plt.Figure:
    """Returns the confusion matrix, a row for each class that is; shades are shares of the row.

    Few classes have their counts in the cells. Of many, every n-th is named; of more than CELLS, several neighbours
    share a cell, which has the largest share among them. title: by default the name of the data.
    """
    matrix, names = np.array(figures["confusion"]), [brief(name, 24) for name in figures["classes"]]
    shares, together = _pooled(matrix / np.maximum(matrix.sum(1, keepdims=True), 1))
    every = -(-len(shares) // NAMED)
    places = range(0, len(shares), every)
    shown = [names[place * together] for place in places]
    notes = [f"1 of {every * together} classes is named"] if every * together > 1 else []
    notes += [f"a cell: {together} x {together} classes, the largest share of them"] if together > 1 else []
    size = min(12.0, max(3.6, 1.8 + 0.24 * len(names)))
    with plt.rc_context(plots.STYLE):
        figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="none")  # the pixels of an SVG are the cells
        axis.grid(False)
        axis.set(ylabel="is", title=f"{figures['data']}: confusion matrix" if title is None else title)
        axis.set_xlabel("; ".join(["said", *notes]))
        axis.set_xticks(places, shown, rotation=90)
        axis.set_yticks(places, shown)
        if len(names) <= NUMBERED:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    color = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def _pooled(shares: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns a square matrix of at most CELLS a side, the largest values of its blocks, and the side of a block."""
    side = -(-len(shares) // CELLS)
    left = -len(shares) % side
    cells = (len(shares) + left) // side
    return np.pad(shares, (0, left)).reshape(cells, side, cells, side).max((1, 3)), side


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
