"""The figures of results: every method with a look of its own, and axes whose labels can be read."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from s2a_cli.results import aggregate, html_report, plots, summary
from s2a_cli.results.evaluation_plots import confusion
from s2a_cli.results.looks import Looks


def look(mark):
    """What tells a mark from others: its colour and its outline."""
    marker = mark["marker"]
    return mark["color"], marker if isinstance(marker, str) else marker.vertices.round(3).tobytes()


def test_no_two_methods_look_the_same():
    methods = [f"method {number}" for number in range(90)]
    looks = Looks.of(methods, ["int4", "none", "tiny"])
    for quant in (None, *looks.quants):
        assert len({look(looks.mark(method, quant)) for method in methods}) == 90
    assert len({look(looks.mark("method 17", quant)) for quant in looks.quants}) == 3
    assert {looks.color(method) for method in methods[:10]} == {look(looks.mark(one))[0] for one in methods[:10]}


def test_a_method_keeps_its_look_in_all_figures_of_a_page(write_result, tmp_path):
    names = [f"method{number:02}" for number in range(23)]
    for number, method in enumerate(names):
        folder = write_result(method, method=method, peak=50.0 + number, top1=60.0 + number)
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "val_top1": 50.0}\n{"epoch": 2, "val_top1": 60.0}\n')
    page = html_report.html(aggregate.load([str(tmp_path / "runs")]), [], tmp_path)
    marks = {}
    for legend in re.findall(r'<ul class="legend">(.*?)</ul>', page, re.DOTALL):
        for svg, name in re.findall(r"<li>(<svg.*?</svg>)\s*(method\d+)", legend, re.DOTALL):
            outline = re.search(r'<defs>\s*<path id="[^"]*" d="([^"]*)" style="([^"]*)"', svg)
            marks.setdefault(name, set()).add(outline.groups() if outline else "none")
    assert set(marks) == set(names) and all(len(found) == 1 for found in marks.values()), "one look a method"
    assert len(set.union(*marks.values())) == len(names), "and no other has it"


@pytest.mark.parametrize("trainable", [[0, 900, 40_000, 3_000_000], [0, 6_500], [0, 5_000, 7_000, 12_000]])
def test_the_labels_beside_zero_do_not_touch(make_result, trainable):
    results = [make_result(method=f"m{number}", top1=70.0 + number) for number in range(len(trainable))]
    for found, count in zip(results, trainable, strict=True):
        found["parameters"]["trainable"] = count
    rows = summary.table(aggregate.from_results(results))
    with plots.plt.rc_context(plots.STYLE):
        panels, _ = plots.pareto_panels(rows, "trainable", plots.looks_of(rows))
        figure = panels.figures[0][1]
        figure.draw_without_rendering()
        axis = figure.axes[0]
        boxes = sorted(
            (box.get_window_extent() for box in axis.get_xticklabels() if box.get_text()), key=lambda box: box.x0
        )
        low, high = axis.get_xlim()
        shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
    plots.plt.close(figure)
    assert shown[0] == 0 and len(shown) > 1
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_one_epoch_has_one_label():
    points = pd.DataFrame({"epoch": [1], "score": [50.0]})
    panels = plots.curves([("title", "top-1 %", [("bias", "none", points)])], Looks.of(["bias"], ["none"]))
    one = pd.DataFrame({"epoch": [1], "train_loss": [1.0], "val_loss": [1.0], "val_top1": [50.0]})
    for _, figure in [*panels.figures, *plots.run_curves(one, 1).figures]:
        figure.draw_without_rendering()
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1"]
        plots.plt.close(figure)


@pytest.mark.parametrize(
    "classes, cells, named, note",
    [
        (12, 12, 12, "said"),
        (60, 60, 60, "said"),
        (102, 102, 51, "said; 1 of 2 classes is named"),
        (1000, 334, 56, "said; 1 of 18 classes is named; a cell: 3 x 3 classes, the largest share of them"),
    ],
)
def test_a_confusion_matrix_is_drawn_of_any_number_of_classes(classes, cells, named, note):
    matrix = 3 * np.eye(classes, dtype=int)
    matrix[7, 2] = 1
    names = [f"class {number}" for number in range(classes)]
    figure = confusion({"confusion": matrix.tolist(), "classes": names, "data": "photos"})
    axis = figure.axes[0]
    shares, together = axis.images[0].get_array(), -(-classes // cells)
    assert shares.shape == (cells, cells) and shares[7 // together, 2 // together] == 0.25
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == named and labels[1] == f"class {int(axis.get_yticks()[1]) * together}"
    assert axis.get_xlabel() == note and len(axis.texts) == (classes + 1 if classes <= 15 else 0)
    plots.plt.close(figure)
