"""What an evaluation found: its figures, as text, as JSON and as pictures.

One label an image. All figures come from what was answered for each image, so that none needs the model again.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from tabulate import tabulate

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_file, atomic_write
from s2a_cli.common.text import brief, counted, listed, printable
from s2a_cli.results.made_files import safe_cell

SCHEMA = 1
FILES = ("evaluation.json", "answers.csv", "confusion.svg", "calibration.svg")
BINS = 15  # of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)
ROWS = 30  # classes that are printed, at most
PAIRS = 10  # confusions that are printed, at most
NAME = 28  # characters of a class's name


class Tested(Protocol):
    """What evaluations have in common: see Evaluation."""

    run: str
    run_id: str
    data: str
    classes: list[str]
    notes: list[str]


def head(found: Tested, images: int, classes_tested: int) -> dict[str, Any]:
    """Returns what evaluation.json begins with."""
    return {
        "schema": SCHEMA,
        "run": found.run,
        "run_id": found.run_id,
        "data": found.data,
        "notes": found.notes,
        "images": images,
        "classes": found.classes,
        "classes_tested": classes_tested,
    }


@dataclass
class Answers:
    """What a model answered for each of N labelled images."""

    images: list[str]  # what to call each
    targets: np.ndarray  # [N] int, index into the class names
    predicted: np.ndarray  # [N] int
    confidence: np.ndarray  # [N], the probability of the predicted class
    in_top5: np.ndarray | None  # [N] bool; None with fewer than six classes
    loss: float  # mean cross-entropy


@dataclass
class Evaluation:
    """An evaluation: of which run, on what data, and what was answered."""

    run: str  # its folder
    run_id: str
    data: str  # what was tested on
    classes: list[str]
    answers: Answers
    notes: list[str]  # what to know about the data: a sentence each

    def figures(self) -> dict[str, Any]:
        """Returns all figures as evaluation.json has them; shares in %.

        Means over classes are over those with an image. The confusion matrix has a row for each class that is, and a
        column for each that was answered.
        """
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # slow to import

        answers, count = self.answers, len(self.answers.targets)
        labels = range(len(self.classes))
        right = answers.predicted == answers.targets
        scores = precision_recall_fscore_support(
            answers.targets,
            answers.predicted,
            labels=labels,
            zero_division=0,  # pyright: ignore[reportArgumentType]  # the stubs know a text alone
        )
        precision, recall, f1, support = cast(tuple[np.ndarray, ...], scores)
        tested = [label for label in labels if support[label]]
        matrix = confusion_matrix(answers.targets, answers.predicted, labels=labels)
        bins, error = calibration(answers.confidence, right)
        return {
            **head(self, count, len(tested)),
            "top1": 100 * int(right.sum()) / count,
            "top1_wilson_95": wilson(int(right.sum()), count),
            "top5": None if answers.in_top5 is None else 100 * int(answers.in_top5.sum()) / count,
            "balanced": 100 * sum(_shares(matrix)) / len(tested),
            "macro_f1": 100 * float(np.mean(f1[tested])),
            "expected_calibration_error_15_bins": error,
            "loss": answers.loss,
            "by_class": [
                {
                    "class": self.classes[label],
                    "images": int(support[label]),
                    "recall": 100 * float(recall[label]) if support[label] else None,
                    "precision": 100 * float(precision[label]) if matrix[:, label].any() else None,
                    "f1": 100 * float(f1[label]) if support[label] else None,
                }
                for label in labels
            ],
            "confusion": matrix.tolist(),
            "calibration": bins,
        }


def _shares(matrix: np.ndarray) -> list[float]:
    """Returns the accuracy on the images of each class that has some."""
    return [int(row[label]) / int(row.sum()) for label, row in enumerate(matrix) if row.any()]


def wilson(right: int, count: int) -> list[float]:
    """Returns the 95 % interval of Wilson of a share, [lowest, highest] in %."""
    from scipy.stats import binomtest  # takes a second to import, which training would wait for

    found = binomtest(right, count).proportion_ci(0.95, "wilson")
    return [100 * float(found.low), 100 * float(found.high)]


def calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Returns the bins of the reliability diagram that hold images, and the expected calibration error in %.

    Bins are of equal width in the confidence. The error is the mean over images of |accuracy - confidence| of their
    bin.
    """
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in np.unique(places):
        inside = places == place
        sure, accuracy = 100 * float(confidence[inside].mean()), 100 * float(right[inside].mean())
        low, high = 100 * float(place) / BINS, 100 * float(place + 1) / BINS
        bins.append({"from": low, "to": high, "images": int(inside.sum()), "confidence": sure, "accuracy": accuracy})
        error += abs(accuracy - sure) * int(inside.sum()) / len(right)
    return bins, error


def text(figures: dict[str, Any]) -> str:
    """Returns the figures as lines and tables for a terminal."""
    low, high = figures["top1_wilson_95"]
    most = max(figures["by_class"], key=lambda row: row["images"])
    always = 100 * most["images"] / figures["images"]
    of = "1 class" if figures["classes_tested"] == 1 else f"{figures['classes_tested']} classes"
    lines = [
        f"{printable(figures['data'])}: {counted(figures['images'], 'image')} of {of}",
        *(f"  {printable(note)}" for note in figures["notes"]),
        "",
        f"top-1              {figures['top1']:6.2f} %  95 % interval {low:.2f} to {high:.2f} % (Wilson)",
        *([f"top-5              {figures['top5']:6.2f} %"] if figures["top5"] is not None else []),
        f"balanced accuracy  {figures['balanced']:6.2f} %  mean over classes of their recall",
        f"macro F1           {figures['macro_f1']:6.2f} %  mean over classes",
        f"calibration error  {figures['expected_calibration_error_15_bins']:6.2f} %  expected (ECE), {BINS} bins",
        f"most frequent      {always:6.2f} %  always answering {brief(most['class'], NAME)}",
        f"loss               {figures['loss']:6.4f}    mean cross-entropy",
        "",
        *_by_class(figures),
        "",
        *_confusions(figures),
    ]
    return "\n".join(lines).rstrip()


def _by_class(figures: dict[str, Any]) -> list[str]:
    rows = [row for row in figures["by_class"] if row["images"]]
    left = len(rows) - ROWS
    if left > 0:
        rows = sorted(rows, key=lambda row: row["f1"])[:ROWS]
    cells = [
        [brief(row["class"], NAME), row["images"], *(row[name] for name in ("recall", "precision", "f1"))]
        for row in rows
    ]
    head = ["class", "images", "recall %", "precision %", "F1 %"]
    table = tabulate(cells, head, floatfmt=".2f", missingval="-", disable_numparse=[0])
    return [table, *([f"the {ROWS} classes with the lowest F1; {left} more in evaluation.json"] if left > 0 else [])]


def _confusions(figures: dict[str, Any]) -> list[str]:
    """Returns the confusion matrix of a few classes, and of many the largest confusions."""
    matrix, names = np.array(figures["confusion"]), figures["classes"]
    if len(names) <= 10:
        short = [brief(name, 12) for name in names]
        return [tabulate([[name, *row] for name, row in zip(short, matrix.tolist())], ["is \\ said", *short])]
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    pairs = sorted(zip(*np.nonzero(wrong)), key=lambda pair: -wrong[pair])
    if not pairs:
        return []
    cells = [[brief(names[is_], NAME), brief(names[said], NAME), int(wrong[is_, said])] for is_, said in pairs[:PAIRS]]
    left = len(pairs) - PAIRS
    more = [f"the {PAIRS} most frequent confusions; {left} more in evaluation.json"] if left > 0 else []
    return [tabulate(cells, ["is", "said", "times"], disable_numparse=[0, 1]), *more]


def folder_name(data: str, revision: str) -> str:
    """Returns the name of the folder within a run's in which an evaluation on other data lies.

    Two data sets of one name have two, the same data always has the same.
    """
    readable = re.sub(r"[^-.\w]+", "_", data)[:50]
    return f"evaluation-{readable}-{revision}"


def check_out(folder: Path, force: bool) -> None:
    """Raises UserError for what is no folder, and without `force` for a folder that holds other files."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder}: is no folder; expected the name of one")
    if folder.is_dir() and not force and (others := sorted({path.name for path in folder.iterdir()} - {*FILES})):
        raise UserError(f"out={folder}: holds {listed(others, 3)}; choose another folder, or add --force")


def write(folder: Path, evaluation: Evaluation, figures: dict[str, Any]) -> list[Path]:
    """Writes evaluation.json, answers.csv (a line an image) and two pictures to a folder, made if need be.

    Returns what was written. Raises OSError.
    """
    from s2a_cli.results import evaluation_plots

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in FILES]
    atomic_write(written[1], _answers(evaluation))
    for path, draw in zip(written[2:], (evaluation_plots.confusion, evaluation_plots.reliability)):
        with atomic_file(path) as file:
            evaluation_plots.save(draw(figures), file)
    atomic_write(written[0], json.dumps(figures, indent=1) + "\n")
    return written


def _answers(evaluation: Evaluation) -> str:
    """Returns a CSV with a line an image: what it is, what was said, and how surely."""
    answers, names = evaluation.answers, [safe_cell(name) for name in evaluation.classes]
    lines = io.StringIO()
    rows = csv.writer(lines)
    rows.writerow(["image", "class", "predicted", "probability"])
    for image, target, predicted, confidence in zip(
        answers.images, answers.targets, answers.predicted, answers.confidence
    ):
        rows.writerow([safe_cell(image), names[target], names[predicted], f"{confidence:.6f}"])
    return lines.getvalue()
