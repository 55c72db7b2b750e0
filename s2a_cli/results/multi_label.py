"""What an evaluation of a run whose images may have several labels found: its figures, as text and as JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from s2a_cli.common.files import atomic_write
from s2a_cli.common.text import brief, counted, printable
from s2a_cli.results.evaluation import NAME, ROWS, head
from s2a_cli.results.made_files import safe_cell
from s2a_cli.results.metrics import mean_average_precision

LIMIT = 0.5  # the probability from which on a label counts as answered


@dataclass
class MultiLabelEvaluation:
    """An evaluation: of which run, on what data, and how probable each label was for each of N images."""

    run: str  # its folder
    run_id: str
    data: str  # what was tested on
    classes: list[str]
    images: list[str]  # what to call each
    targets: np.ndarray  # [N, classes] of 0 and 1
    logits: np.ndarray  # [N, classes]; probabilities of 1 tie where logits do not
    loss: float  # mean binary cross-entropy
    notes: list[str]  # what to know about the data: a sentence each

    @property
    def probabilities(self) -> np.ndarray:
        """The probability of each label, [N, classes]."""
        return 1 / (1 + np.exp(-np.clip(self.logits, -80, 80)))

    def figures(self) -> dict[str, Any]:
        """Returns all figures as evaluation.json has them; shares in %.

        Means over classes are over those that occur.
        """
        given, answered = self.targets > 0, self.probabilities >= LIMIT
        rows = []
        for label, name in enumerate(self.classes):
            both = int((given[:, label] & answered[:, label]).sum())
            has, said = int(given[:, label].sum()), int(answered[:, label].sum())
            precision = mean_average_precision(self.logits[:, [label]], self.targets[:, [label]]) if has else None
            rows.append(
                {
                    "class": name,
                    "images": has,
                    "average_precision": precision,
                    "recall": 100 * both / has if has else None,
                    "precision": 100 * both / said if said else None,
                    "f1": 200 * both / (has + said) if has else None,
                }
            )
        tested = [row for row in rows if row["images"]]
        return {
            **head(self, len(self.images), len(tested)),
            "map": mean_average_precision(self.logits, self.targets),
            "macro_f1": float(np.mean([row["f1"] for row in tested])) if tested else None,
            "all_labels_right": 100 * float((given == answered).all(1).mean()),
            "loss": self.loss,
            "by_class": rows,
        }


def text(figures: dict[str, Any]) -> str:
    """Returns the figures as lines and a table for a terminal."""
    rows = [row for row in figures["by_class"] if row["images"]]
    left = len(rows) - ROWS
    if left > 0:
        rows = sorted(rows, key=lambda row: row["average_precision"])[:ROWS]
    names = ("average_precision", "recall", "precision", "f1")
    cells = [[brief(row["class"], NAME), row["images"], *(row[name] for name in names)] for row in rows]
    head = ["class", "images", "AP %", "recall %", "precision %", "F1 %"]
    table = cells and tabulate(cells, head, floatfmt=".2f", missingval="-", disable_numparse=[0])
    lines = [
        f"{printable(figures['data'])}: {counted(figures['images'], 'image')}, several labels each",
        *(f"  {printable(note)}" for note in figures["notes"]),
        "",
        f"mAP                {_percent(figures['map'])}  mean over classes of their average precision",
        f"macro F1           {_percent(figures['macro_f1'])}  mean over classes, labels above {LIMIT}",
        f"all labels right   {figures['all_labels_right']:6.2f} %  of the images",
        f"loss               {figures['loss']:6.4f}    mean binary cross-entropy",
        "",
        table or "no image has a label",
        *([f"the {ROWS} classes with the lowest AP; {left} more in evaluation.json"] if left > 0 else []),
    ]
    return "\n".join(lines)


def _percent(figure: float | None) -> str:
    return "     – %" if figure is None else f"{figure:6.2f} %"


def write(folder: Path, evaluation: MultiLabelEvaluation, figures: dict[str, Any]) -> list[Path]:
    """Writes evaluation.json, and answers.csv with an image's labels and the probability of each, to a folder.

    Returns what was written. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, names = io.StringIO(), [safe_cell(name) for name in evaluation.classes]
    rows = csv.writer(lines)
    rows.writerow(["image", "labels", *names])
    for image, target, probabilities in zip(evaluation.images, evaluation.targets, evaluation.probabilities):
        labels = safe_cell(json.dumps([evaluation.classes[label] for label in np.flatnonzero(target)]))
        rows.writerow([safe_cell(image), labels, *(f"{probability:.6f}" for probability in probabilities)])
    written = [folder / name for name in ("evaluation.json", "answers.csv")]
    atomic_write(written[1], lines.getvalue())
    atomic_write(written[0], json.dumps(figures, indent=1) + "\n")
    return written
