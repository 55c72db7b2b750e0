"""`s2a report run=DIR`: one self-contained page of one run."""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from s2a_cli.common.text import brief, first_line, listed, printable
from s2a_cli.config.rules import show
from s2a_cli.results import pages, plan_text, plots, record, run_folder
from s2a_cli.results.evaluation import Evaluation
from s2a_cli.results.evaluation_plots import confusion
from s2a_cli.results.formats import label, mib, number
from s2a_cli.results.multi_label import MultiLabelEvaluation
from s2a_cli.results.pages import drawn

SHOWN = 24  # pictures of mistakes, and of the least certain
NOTHING: dict[str, Any] = {"panels": [], "legend": []}
BESIDE = 30  # classes of a confusion matrix that leaves room for a table beside it
PAIRS = 20  # confusions that are listed


@dataclass(frozen=True)
class Picture:
    """One image of the test split: what it is, what was said, and how probable that was."""

    place: int  # in the split
    truth: str
    said: str
    probability: float


@dataclass
class Tested:
    """What a run answered on its test split, and small JPEGs of the images that are shown, by their place."""

    evaluation: Evaluation | MultiLabelEvaluation
    mistakes: list[Picture]
    uncertain: list[Picture]
    thumbnails: dict[int, bytes]


@dataclass
class Uses:
    """What is alive at the predicted peak of a training step, in MiB by use, beside full fine-tuning."""

    mine: dict[str, float]
    full: dict[str, float]
    where: str  # the peak is, and what is counted


def most_confident_mistakes(evaluation: Evaluation | MultiLabelEvaluation) -> list[Picture]:
    """Returns the wrong answers that were given with the highest probability, at most SHOWN.

    Where images have several labels, an image counts by its label that is furthest from right.
    """
    if isinstance(evaluation, MultiLabelEvaluation):
        return _labels(evaluation, lambda off: -off, wrong=True)
    answers = evaluation.answers
    wrong = np.flatnonzero(answers.predicted != answers.targets)
    order = wrong[np.argsort(-answers.confidence[wrong], kind="stable")]
    return [_picture(evaluation, place) for place in order[:SHOWN].tolist()]


def least_certain(evaluation: Evaluation | MultiLabelEvaluation) -> list[Picture]:
    """Returns the answers that were given with the lowest probability, right or wrong, at most SHOWN.

    Where images have several labels, an image counts by its label that is nearest to a probability of 1/2.
    """
    if isinstance(evaluation, MultiLabelEvaluation):
        return _labels(evaluation, lambda off: np.abs(off - 0.5), wrong=False)
    order = np.argsort(evaluation.answers.confidence, kind="stable")
    return [_picture(evaluation, place) for place in order[:SHOWN].tolist()]


def _picture(evaluation: Evaluation, place: int) -> Picture:
    answers, names = evaluation.answers, evaluation.classes
    said, truth = names[answers.predicted[place]], names[answers.targets[place]]
    return Picture(place, truth, said, float(answers.confidence[place]))


def _labels(evaluation: MultiLabelEvaluation, worth: Callable[[np.ndarray], np.ndarray], wrong: bool) -> list[Picture]:
    """Returns images by the label that is worth the least, with what was said of that label."""
    off = np.abs(evaluation.probabilities - evaluation.targets)
    worths = worth(off)
    labels = worths.argmin(1)
    rows = np.arange(len(labels))
    order = np.argsort(worths[rows, labels], kind="stable")
    order = [place for place in order if not wrong or off[place, labels[place]] > 0.5][:SHOWN]
    found = []
    for place in map(int, order):
        name = evaluation.classes[labels[place]]
        has = [evaluation.classes[one] for one in np.flatnonzero(evaluation.targets[place])]
        found.append(
            Picture(place, listed(has) or "no label", name, float(evaluation.probabilities[place, labels[place]]))
        )
    return found


def html(
    folder: Path,
    result: record.Result,
    command: str | None,
    tested: Tested | None,
    untested: str,
    uses: Uses | None,
) -> str:
    """Returns the page of a run.

    command: that does it again. untested: why there is nothing of its test split, where tested is None.
    """
    figures, method = tested.evaluation.figures() if tested else None, result["config"]["method"]["name"]
    with plots.plt.rc_context(plots.STYLE):
        curves, said = _curves(folder, result)
        matrix = _matrix(figures) if figures else NOTHING
    return pages.render(
        "run_report.html",
        title=f"{result['data']['name']}: {method} on {result['config']['backbone']['name']}",
        folder=str(folder),
        result=result,
        scores=_scores(result, figures),
        about=_about(result),
        data=_data(result, tested),
        curves=curves | {"said": said},
        figures=figures,
        matrix=matrix,
        beside=len(result["data"]["classes"]) <= BESIDE,
        confusions=_confusions(figures) if figures else [],
        classes=_by_class(figures) if figures else None,
        mistakes=_shown(tested, tested.mistakes) if tested else [],
        uncertain=_shown(tested, tested.uncertain) if tested else [],
        untested=untested,
        memory=_memory(result),
        uses=_uses(uses),
        plan=_plan(result["plan"]),
        command=command,
        settings=_settings(result["config"]),
        environment=[(key, label(value)) for key, value in result["environment"].items()],
    )


def _curves(folder: Path, result: record.Result) -> tuple[dict[str, Any], str]:
    """Returns the learning curves of metrics.jsonl, and a line about them."""
    try:
        frame = pd.DataFrame(record.read_epochs(folder / run_folder.METRICS))
        if not {"epoch", "train_loss", "val_loss"} <= set(frame):
            raise ValueError("no epochs in it")
        panels = plots.run_curves(cast(pd.DataFrame, frame.apply(pd.to_numeric)), result["accuracy"]["best_epoch"])
    except FileNotFoundError:
        return NOTHING, f"No {run_folder.METRICS} in the folder: no epoch was finished."
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return NOTHING, f"{run_folder.METRICS} can't be read: {first_line(error)}."
    return drawn(
        panels, "curve"
    ), "The training loss is a mean over the epoch, under augmentation and in training mode."


def _matrix(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the confusion matrix as a figure; nothing for several labels an image."""
    if "confusion" not in figures:
        return NOTHING
    return drawn(plots.Panels([("", confusion(figures, title=""))], []), "matrix")


def _confusions(figures: dict[str, Any]) -> list[list[str]]:
    """Returns the most frequent confusions: what it is, what was said, how often."""
    if "confusion" not in figures:
        return []
    matrix, names = np.array(figures["confusion"]), figures["classes"]
    np.fill_diagonal(matrix, 0)
    pairs = sorted(zip(*np.nonzero(matrix), strict=True), key=lambda pair: -matrix[pair])
    return [[printable(names[is_]), printable(names[said]), str(matrix[is_, said])] for is_, said in pairs[:PAIRS]]


def _by_class(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the table by class."""
    titles = {"average_precision": "AP %", "recall": "recall %", "precision": "precision %", "f1": "F1 %"}
    shown = {name: title for name, title in titles.items() if name in figures["by_class"][0]}
    lines = [
        [printable(row["class"]), str(row["images"]), *("–" if row[n] is None else number(row[n], 2) for n in shown)]
        for row in figures["by_class"]
    ]
    return {"head": ["class", "images", *shown.values()], "right": ["images", *shown.values()], "lines": lines}


def _scores(result: record.Result, figures: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Returns (figure, name, what else to know) of what the run reached."""
    accuracy, said = result["accuracy"], []
    headline = record.headline(accuracy)
    interval = ""
    if figures and "top1_wilson_95" in figures:
        interval = "95 % interval {:.1f} to {:.1f} %, Wilson".format(*figures["top1_wilson_95"])
    if headline.test is not None:
        said.append((f"{headline.test:.2f} %", f"test {headline.name}", interval))
    if accuracy["test_balanced"] is not None:
        said.append((f"{accuracy['test_balanced']:.2f} %", "balanced accuracy", "mean over classes, test"))
    if headline.val is not None:
        said.append((f"{headline.val:.2f} %", f"validation {headline.name}", f"best epoch {accuracy['best_epoch']}"))
    if figures and "expected_calibration_error_15_bins" in figures:
        error = figures["expected_calibration_error_15_bins"]
        said.append((f"{error:.2f} %", "calibration error", "expected, 15 bins, test"))
    if memory := result["memory"]:
        kind = memory["kind"].split("-")[0]
        said.append((f"{mib(memory['peak_mib'])} MiB", "peak of a step", kind))
    if speed := result["throughput"]["train_images_per_second"]:
        said.append((number(speed, 1), "images a second", "training, images loaded"))
    return said


def _about(result: record.Result) -> list[tuple[str, str]]:
    """Returns (name, text) of what was trained."""
    config, parameters = result["config"], result["parameters"]
    backbone, optim = config["backbone"], config["optim"]
    size = f" at {backbone['image_size']} px" if backbone.get("image_size") else ""
    trained = (
        f"{parameters['trainable'] / 1e6:,.3f} M parameters ({parameters['percent']:.2f} % of the backbone), and the"
        f" head's {parameters['head'] / 1e6:,.3f} M"
    )
    batch = optim.get("batch_size", "?")
    return [
        ("status", result["status"] + (f": {result['error']}" if result["error"] else "")),
        ("backbone", f"{backbone.get('timm', backbone['name'])}{size}, weights {result['weights'][:12]}"),
        ("method", f"{config['method']['name']}: {trained}"),
        ("activations", f"quant={config['quant']['name']}, precision={config.get('precision', 'fp32')}"),
        (
            "optimiser",
            f"{optim['name']}, lr {label(optim.get('lr'))}, {optim.get('epochs', '?')} epochs, batch {batch}",
        ),
        ("seed", label(config.get("seed", 0))),
    ]


def _data(result: record.Result, tested: Tested | None) -> list[tuple[str, str]]:
    data = result["data"]
    notes = tested.evaluation.notes if tested else []
    several = ", several labels an image" if data["multi_label"] else ""
    return [
        ("data set", f"{data['name']}, revision {data['revision']}"),
        ("classes", f"{len(data['classes'])}{several}: {listed(data['classes'], 12)}"),
        ("images", f"{data['train']:,} train, {data['val']:,} validation, {data['test']:,} test"),
        *(("note", note) for note in notes),
    ]


def _shown(tested: Tested, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Returns the pictures as the template takes them."""
    evaluation, found = tested.evaluation, []
    several = isinstance(evaluation, MultiLabelEvaluation)
    names = evaluation.images if isinstance(evaluation, MultiLabelEvaluation) else evaluation.answers.images
    above = _folder_of_all(names)
    for picture in pictures:
        small = tested.thumbnails.get(picture.place)
        right = picture.said == picture.truth if not several else None
        found.append(
            {
                "name": printable(names[picture.place].removeprefix(above)),
                "source": f"data:image/jpeg;base64,{base64.b64encode(small).decode()}" if small else "",
                "said": brief(picture.said, 40),
                "truth": brief(picture.truth, 60),
                "percent": f"{100 * picture.probability:.1f}",
                "right": right,
            }
        )
    return found


def _folder_of_all(names: list[str]) -> str:
    """Returns the folder that all images lie in, with a slash behind it; empty where they are no files."""
    try:
        return f"{os.path.commonpath([os.path.dirname(name) for name in names])}/"
    except ValueError:
        return ""


def _memory(result: record.Result) -> dict[str, Any] | None:
    """Returns the peak in its parts, in MiB and in % of the larger of it and full fine-tuning's peak."""
    memory = result["memory"]
    if memory is None:
        return None
    peak, static, kept = memory["peak_mib"], memory["static_mib"], memory["kept_mib"]
    full = memory["full_finetune_peak_mib"] or 0.0
    parts, widest = {"static": static, "kept": kept, "transient": max(0.0, peak - static - kept)}, max(peak, full, 1e-9)
    return {
        "kind": "measured" if memory["kind"] == "measured-cuda" else "predicted",
        "peak": mib(peak),
        "parts": {part: (100 * value / widest, mib(value)) for part, value in parts.items()},
        "full": (100 * full / widest, mib(full)) if full else None,
        "times": number(full / peak, 2) if full and peak else None,
    }


def _uses(uses: Uses | None) -> dict[str, Any] | None:
    if uses is None:
        return None
    lines = [[use, mib(size), mib(uses.full.get(use, 0.0))] for use, size in uses.mine.items()]
    lines.append(["sum", mib(sum(uses.mine.values())), mib(sum(uses.full.values()))])
    head = ["alive at the predicted peak, MiB", "this run", "full fine-tuning"]
    return {"head": head, "lines": lines, "right": head[1:], "where": uses.where}


def _plan(plan: record.Plan | None) -> dict[str, Any] | None:
    """Returns what was chosen for a budget, and its alternatives; None without a budget."""
    if plan is None:
        return None
    return {
        "budget": number(plan["available_mib"], 0),
        "device": plan["device"],
        "head": list(plan_text.HEAD),
        "lines": plan_text.lines(plan["choices"]),
        "words": shlex.join(plan["choices"][0]["words"]),
    }


def _settings(config: dict[str, Any]) -> list[list[str]]:
    """Returns [key, value] of every setting."""
    lines: list[list[str]] = []

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                lines.append([printable(f"{prefix}{key}"), printable(show(value))])

    walk(config, "")
    return lines
