"""Describes a data set: before training what it holds and leaves out, after evaluation what needed no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from s2a_cli.common.text import brief, counted, listed, printable
from s2a_cli.data.images import ImageFiles, Images

ROWS = 8  # classes that get a line each; of more classes, the largest and the smallest do
WIDTH = 30  # characters of a name
SPLITS = ("train", "val", "test")


@dataclass
class Splits:
    """The images that a run trains on, chooses by and is judged by."""

    name: str  # in tables and paths
    train: Images
    val: Images  # for choosing; never the test split
    test: Images
    classes: list[str]  # a label is an index into it
    revision: str  # a short hash of the data's content, wherever it lies
    left_out: list[str] = field(default_factory=list)  # what is not used, and why: a phrase each
    notes: list[str] = field(default_factory=list)  # what looks wrong with the images: a sentence each
    same: list[list[str]] = field(default_factory=list)  # groups of files with the same bytes

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.train.classes is not None

    def counts(self) -> np.ndarray:
        """Returns the number of images by class and split, [classes, 3]; one of several labels counts for each."""
        return np.stack([getattr(self, split).counts(len(self.classes)) for split in SPLITS], 1)


def describe(splits: Splits) -> str:
    """Returns a block of lines: classes and counts by split, what is left out and why, and what may mislead."""
    counts, title = splits.counts(), f"data: {printable(splits.name)}"
    images = [len(getattr(splits, split)) for split in SPLITS]
    rows = _rows(splits.classes, counts, images)
    rows = [(brief(printable(name), WIDTH), cells, mark) for name, cells, mark in rows]
    width = max(len(title), *(2 + len(name) for name, _, _ in rows))
    lines = [f"{title:<{width}}" + "".join(f"{split:>8}" for split in SPLITS)]
    for name, cells, mark in rows:
        lines.append((f"{'  ' + name:<{width}}" + "".join(f"{cell:>8}" for cell in cells) + f"  {mark}").rstrip())
    lines += [("  left out: " if number == 0 else " " * 12) + phrase for number, phrase in enumerate(splits.left_out)]
    notes = [*splits.notes, *_several(splits), *_groups(splits), *_shared(splits), *_untested(splits, counts)]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _rows(
    names: Sequence[str], counts: np.ndarray, images: Sequence[int]
) -> list[tuple[str, Sequence[int] | np.ndarray, str]]:
    """Returns (name, images by split, mark) of each class, of many the largest and the smallest, and of all."""
    totals = counts.sum(1)
    largest, smallest = int(totals.argmax()), int(totals.argmin())
    marks = {} if totals[largest] == totals[smallest] else {largest: "largest", smallest: "smallest"}
    every = f"all {len(names)} classes", images, ""
    if len(names) > ROWS and (counts == counts[0]).all():
        return [(f"each of {len(names)} classes", counts[0], ""), every]
    labels = range(len(names)) if len(names) <= ROWS else (largest, smallest)
    return [*((names[label], counts[label], marks.get(label, "")) for label in labels), every]


def _several(splits: Splits) -> list[str]:
    """Returns a note on how many labels images have, where there may be several."""
    if not splits.multi_label:
        return []
    each = [len(labels) for split in SPLITS for labels in getattr(splits, split).labels]
    without = f", {counted(each.count(0), 'image')} without any" if 0 in each else ""
    return [f"several labels an image: {sum(each) / len(each):.2f} on average, {max(each)} at most{without}"]


def _groups(splits: Splits) -> list[str]:
    """Returns a note on how many groups each split has, and on those that published splits tear apart."""
    groups = {split: set(getattr(splits, split).groups or ()) for split in SPLITS}
    if not all(groups.values()):
        return []
    torn = sorted(set().union(*(groups[a] & groups[b] for a, b in combinations(SPLITS, 2))))
    held = ", ".join(f"{len(names)} in {split}" for split, names in groups.items())
    shared = f"{len(torn)} in two splits ({listed(torn, 3)})" if torn else "none in two splits"
    return [f"groups of dataset.hold_out: {held}, {shared}"]


def _untested(splits: Splits, counts: np.ndarray) -> list[str]:
    """Returns notes on the classes without an image in test or in train."""
    notes = []
    for column, said in (
        (2, "never tested, as no image of it is in test"),
        (0, "never trained on, as no image of it is in train"),
    ):
        if missing := [
            f"{splits.classes[label]} ({counted(int(counts[label].sum()), 'image')})"
            for label in np.flatnonzero(counts[:, column] == 0)
        ]:
            notes.append(f"{said if len(missing) == 1 else said.replace('of it', 'of them')}: {listed(missing, 4)}")
    return notes


def _shared(splits: Splits) -> list[str]:
    """Returns notes on files with the same bytes in two splits (which flatters a figure) or in two classes."""
    home: dict[str, tuple[str, int]] = {}
    for split in SPLITS if splits.same else ():
        part = getattr(splits, split)
        if isinstance(part, ImageFiles):
            home |= {file: (split, label) for file, label in zip(part.files, part.labels)}
    groups = [[file for file in group if file in home] for group in splits.same]
    notes = []
    for place, said in ((0, "in two splits"), (1, "in two classes")):
        if torn := [group for group in groups if len({home[file][place] for file in group}) > 1]:
            first = torn[0][0]
            other = next(file for file in torn[0] if home[file][place] != home[first][place])
            pair = " and ".join(f"{printable(file)} ({home[file][0]})" for file in (first, other))
            notes.append(f"the same image {said}: {_times(len(torn))}, such as {pair}")
    return notes


def majority(splits: Splits, top1: float | None) -> str | None:
    """Returns a note where always answering the most frequent test class reaches the accuracy `top1` in %, or None."""
    if top1 is None or not len(splits.test):
        return None
    of_class = splits.test.counts(len(splits.classes))
    label, count, total = int(of_class.argmax()), int(of_class.max()), len(splits.test)
    share = 100 * count / total
    if top1 > share + 0.005:  # figures have two decimals
        return None
    than = "no more than" if top1 > share - 0.005 else f"less than the {share:.2f} % that"
    return (
        f"{top1:.2f} % is {than} always answering {printable(splits.classes[label])!r} gives: {count} of"
        f" {counted(total, 'image')} in test are of that class"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
