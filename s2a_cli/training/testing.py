"""Tests a finished run: again on its own test split, or on other labelled images of its classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.nn import functional as F

from s2a_cli import data
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import counted, first_line, listed
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.config.settings import merge, plain
from s2a_cli.data import Images
from s2a_cli.data.images import ImageFiles
from s2a_cli.results import record
from s2a_cli.results.evaluation import Answers, Evaluation
from s2a_cli.results.multi_label import MultiLabelEvaluation
from s2a_cli.results.run_folder import TEST_FILES
from s2a_cli.training.trained import Trained

FREE = ("cache", "on_corrupt")  # settings of the data that choose no other test split
MOST = 1 << 30  # bytes of a list of files


@dataclass
class Labelled:
    """Images with labels, indices into a run's class names, and what to know about them."""

    name: str
    images: Images
    same: bool = True  # whether they are what the run was tested on
    notes: list[str] = field(default_factory=list)
    revision: str = ""  # of the data set that they are all of, or the test split


def note_test_files(folder: Path, splits: data.Splits) -> None:
    """Writes which files are the test split of a run to its folder, so that it is known when others come or go."""
    if isinstance(splits.test, ImageFiles):
        atomic_write(folder / TEST_FILES, json.dumps(splits.test.files, indent=0))


def own_test(folder: Path, config: DictConfig) -> Labelled:
    """Returns the test split of a run.

    Where files have changed since, such as a photo that was repaired, it is made of the same files as before, as far as
    they are there and can be read. Raises UserError where it can't be told which images it was made of.
    """
    recorded, chosen = record.read_result(folder), config.dataset
    known = recorded["data"]["classes"]
    for key, value in plain(chosen).items():
        free = key in FREE or f"dataset.{key}" in record.NOT_IDENTITY
        if not free and value != recorded["config"]["dataset"].get(key):
            raise UserError(
                f"dataset.{key}={value}: the run was made with {recorded['config']['dataset'].get(key)};"
                " another split could hold images that it was trained on; to test on other data: data=FOLDER"
            )
    dataset: Any = chosen
    if chosen.name in data.OWN:  # a damaged photo to train on matters no more
        dataset = merge(chosen, {"on_corrupt": "skip"})
    splits = data.load(dataset)
    name = f"{splits.name}, test split"
    if splits.revision == recorded["data"]["revision"]:
        return Labelled(name, splits.test)
    changed = (
        f"the data has changed since the training (revision {recorded['data']['revision']}, now {splits.revision})"
    )
    files = _test_files(folder)
    if files is None:
        counts = {split: len(getattr(splits, split)) for split in ("train", "val", "test")}
        if splits.classes == known and all(recorded["data"][split] == n for split, n in counts.items()):
            return Labelled(name, splits.test, False, [f"{changed}, the numbers of images have not"])
        raise UserError(
            f"{folder}: {changed}, and which images it was tested on is not known; test it on all of a folder"
            " that it was not trained on: data=FOLDER"
        )
    source = data.read(dataset)
    parts = [part for part in (source.train, source.val, source.test) if isinstance(part, ImageFiles)]
    labels = {file: label for part in parts for file, label in zip(part.files, part.labels)}
    there, gone = [file for file in files if file in labels], [file for file in files if file not in labels]
    if not there:
        raise UserError(f"{folder}: {changed}, and none of the {len(files)} images of its test split is there")
    notes = [f"{changed}: tested on the {len(there)} images of its test split that are there"]
    if gone:
        notes.append(f"{counted(len(gone), 'image')} of it can't be read or is gone: {listed(gone, 3)}")
    images = ImageFiles(parts[0].root, there, [labels[file] for file in there], parts[0].classes)
    return Labelled(name, _relabelled(images, source.classes, known), False, notes)


def _test_files(folder: Path) -> list[str] | None:
    """Returns the files of a run's test split; None where they were not noted. Raises UserError for a damaged list."""
    try:
        files = json.loads(record.regular(folder / TEST_FILES, MOST))
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise ValueError("no list of files")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / TEST_FILES}: can't be read ({first_line(error)})") from None
    return files


def elsewhere(trained_on: record.Data, dataset: DatasetConfig) -> Labelled:
    """Returns the test split of a data set, or all of one without, for a run that was trained on `trained_on`.

    Raises UserError for a class that the run does not know,
    and for images with one label where the run gives several, or the other way round.
    """
    known, multi_label = trained_on["classes"], trained_on["multi_label"]
    source, name = data.read(dataset, to_train=False), data.title(dataset)
    images = source.train if source.test is None else source.test
    notes = [f"left out: {phrase}" for phrase in source.left_out]
    if source.test is not None:
        name = f"{name}, test split"
    if multi_label != (images.classes is not None):
        said = ("several labels", "one label") if multi_label else ("one label", "several labels")
        raise UserError(f"data={name}: the run gives an image {said[0]}, and here it has {said[1]}")
    there = sorted({source.classes[label] for label in images.present()})
    if unknown := [one for one in there if one not in known]:
        raise UserError(
            f"data={name}: has {listed(unknown)}, which the run was not trained on; its classes are {listed(known, 10)}"
        )
    if len(there) < len(known):
        notes.append(f"{len(there)} of the run's {len(known)} classes occur; an answer may be any of the {len(known)}")
    return Labelled(name, _relabelled(images, source.classes, known), False, notes, source.revision)


def _relabelled(images: Images, classes: Sequence[str], known: Sequence[str]) -> Images:
    """Returns images whose labels are indices into `known` in place of `classes`."""
    places = {place: known.index(name) for place, name in enumerate(classes) if name in known}
    changed = images.subset(range(len(images)))
    if images.classes is None:
        changed.labels = [places[label] for label in images.labels]
    else:
        changed.labels = [tuple(places[label] for label in of_image) for of_image in images.labels]
        changed.classes = len(known)
    return changed


def _loader(trained: Trained, images: Images) -> data.Loader:
    config = trained.config
    return data.loader(
        images,
        trained.transform,
        config.optim.batch_size,
        workers=config.workers,
        pin_memory=trained.device.type == "cuda",
    )


@torch.no_grad()
def answer(trained: Trained, images: Images) -> Answers:
    """Returns what a run's model answers for labelled images, and shows the progress."""
    five, loader = len(trained.classes) > 5, _loader(trained, images)
    losses, predicted, confidence, in_top5 = [], [], [], []
    with Progress("testing", len(images), " images") as progress:
        for batch, targets in loader:
            logits = trained(batch)
            targets = targets.to(logits.device)
            losses.append(F.cross_entropy(logits, targets, reduction="sum").double())
            said = logits.argmax(1)
            predicted.append(said.cpu())
            confidence.append(logits.softmax(1).gather(1, said[:, None])[:, 0].cpu())
            if five:
                in_top5.append((logits.topk(5).indices == targets[:, None]).any(1).cpu())
            progress.add(len(batch))
    return Answers(
        [images.name(place) for place in range(len(images))],
        np.array(images.labels),
        torch.cat(predicted).numpy(),
        torch.cat(confidence).numpy(),
        torch.cat(in_top5).numpy() if five else None,
        torch.stack(losses).sum().item() / len(images),
    )


@torch.no_grad()
def label(trained: Trained, labelled: Labelled) -> MultiLabelEvaluation:
    """Tests a run that gives an image several labels, and shows the progress."""
    images, outputs, targets = labelled.images, [], []
    loader = _loader(trained, images)
    with Progress("testing", len(images), " images") as progress:
        for batch, target in loader:
            outputs.append(trained(batch).cpu())
            targets.append(target)
            progress.add(len(batch))
    logits, target = torch.cat(outputs), torch.cat(targets)
    return MultiLabelEvaluation(
        str(trained.folder),
        trained.record["id"],
        labelled.name,
        trained.classes,
        [images.name(place) for place in range(len(images))],
        target.numpy(),
        logits.numpy(),
        F.binary_cross_entropy_with_logits(logits, target).item(),
        labelled.notes,
    )


def evaluate(trained: Trained, labelled: Labelled) -> Evaluation | MultiLabelEvaluation:
    """Tests a run on labelled images."""
    if trained.multi_label:
        return label(trained, labelled)
    answers = answer(trained, labelled.images)
    return Evaluation(
        str(trained.folder), trained.record["id"], labelled.name, trained.classes, answers, labelled.notes
    )
