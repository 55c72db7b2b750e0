"""Reads images that a table lists: a CSV, TSV or Parquet file with a line for each image, its labels and its split."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, counted, listed, natural, printable
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.columns import Columns, find_columns, read_frame
from s2a_cli.data.images import EXTENSIONS, ImageFiles
from s2a_cli.data.integrity import examine
from s2a_cli.data.layout import SPLITS
from s2a_cli.data.source import Source


@dataclass
class _Row:
    """What the table says of one image."""

    labels: set[str] = field(default_factory=set)
    split: str | None = None
    group: str | None = None


def read(config: DatasetConfig, cache: Path) -> Source:
    """Reads the images that `config.file` lists, whose paths are relative to `config.root` or else to its folder.

    Decodes every image once. Raises UserError for a table without paths or labels, for an image with two labels where
    it can have but one, and, unless config.on_corrupt is "skip", for a file that is missing or can't be decoded.
    """
    assert config.file is not None, "data.problems asks for it"
    table = Path(config.file).expanduser()
    root = Path(config.root).expanduser() if config.root else table.parent
    frame = read_frame(table)
    columns = find_columns(frame, table, config)
    rows, left_out = _rows(frame, columns, table, root)
    if not columns.multi_label and (bare := [file for file, row in rows.items() if not row.labels]):
        left_out.append(f"{counted(len(bare), 'image')} without a label ({listed(bare, 3)})")
        rows = {file: row for file, row in rows.items() if row.labels}
    missing = [file for file in rows if not os.path.isfile(root / file)]
    if missing and (config.on_corrupt == "stop" or len(missing) == len(rows)):
        raise UserError(
            f"{printable(table)} lists {len(rows)} images, of which {len(missing)} are not there, the first as"
            f" {brief(str(root / missing[0]), 300)}; dataset.root= is the folder that paths are relative to"
            + ("" if len(missing) == len(rows) else ", and dataset.on_corrupt=skip leaves such lines out")
        )
    report = examine(root, sorted(rows), cache / "checked")
    if config.on_corrupt == "stop":
        report.refuse_damaged(root)
    rows = {file: rows[file] for file in sorted(rows) if file not in report.damaged}
    classes = sorted({label for row in rows.values() for label in row.labels}, key=natural)
    if columns.classes:
        classes = [name for name in columns.classes if columns.multi_label or name in classes]
    if len(classes) < 2 and not (columns.multi_label and classes):
        has = f"1 class: {printable(classes[0])}" if classes else "no labels"
        raise UserError(f"{printable(table)} has {has}; two classes are needed")
    said = json.dumps([[file, sorted(row.labels), row.split, row.group] for file, row in rows.items()])
    revision = sha256(f"{report.revision} {json.dumps(classes)} {said}".encode()).hexdigest()[:12]
    splits = {split: _images(root, rows, split, classes, columns) for split in (None, *SPLITS)}
    if columns.split is None:
        train, val, test = splits[None], None, None
    else:
        train, val, test = (splits[split] if len(splits[split]) else None for split in SPLITS)
        if train is None:
            raise UserError(f"{printable(table)}: column {columns.split!r} puts no image into train")
        if count := len(splits[None]):
            left_out.append(f"{counted(count, 'image')} without a split in column {columns.split!r}")
    notes = [f"{printable(table.name)}: {columns.describe()}", *report.notes()]
    return Source(train, val, test, classes, revision, [*left_out, *report.left_out()], notes, report.same)


def _rows(frame, columns: Columns, table: Path, root: Path) -> tuple[dict[str, _Row], list[str]]:
    """Returns {path relative to the root, or absolute: what the table says}, and phrases on lines that are left out.

    Raises UserError where two lines disagree about an image.
    """
    rows: dict[str, _Row] = {}
    left_out, again = Counter[str](), 0
    find = _Finder(root)
    for line, (name, labels, split, group) in zip(frame.index + 2, columns.values(frame)):
        if not name:
            left_out["without a path"] += 1
            continue
        file = find(name)
        if file not in rows:
            rows[file] = _Row(set(labels), split, group)
            continue
        before, again = rows[file], again + 1
        there = f"{printable(table)}, line {line}: {printable(file)} is there before"
        if before.split != split:
            raise UserError(f"{there}, in another split")
        if before.group != group:
            raise UserError(f"{there}, in another group ({listed([before.group or 'none', group or 'none'])})")
        if set(labels) != before.labels and columns.classes:
            raise UserError(f"{there}, with other marks in the columns of classes; keep one of the lines")
        if set(labels) != before.labels and not columns.multi_label:
            both = listed(sorted(before.labels | set(labels)))
            raise UserError(
                f"{there}, with another label ({both}); keep one, or say dataset.multi_label=true, which joins the"
                " labels of such lines"
            )
        before.labels |= set(labels)
    phrases = [f"{counted(count, 'line')} {why}" for why, count in left_out.items()]
    if again and (columns.classes or not columns.multi_label):
        phrases.append(f"{counted(again, 'line')} of an image that is there before")
    return rows, phrases


class _Finder:
    """Turns a path of the table into one relative to the root, or an absolute one outside of it.

    A name without an ending stands for the image of that name with one.
    """

    def __init__(self, root: Path):
        self.root, self.real, self.ending = root, os.path.abspath(root), ""

    def __call__(self, name: str) -> str:
        path = os.path.normpath(os.path.join(self.real, name.replace("\\", "/") if "/" not in name else name))
        if not path.lower().endswith(EXTENSIONS) and not os.path.isfile(path):
            endings = (self.ending, *EXTENSIONS, *map(str.upper, EXTENSIONS))
            self.ending = next((ending for ending in endings if os.path.isfile(path + ending)), "")
            path += self.ending
        inside = os.path.commonpath([path, self.real]) == self.real
        return os.path.relpath(path, self.real).replace(os.sep, "/") if inside else path


def _images(root: Path, rows: dict[str, _Row], split: str | None, classes: list[str], columns: Columns) -> ImageFiles:
    """Returns the images of a split, in the order of their paths; None: those without one."""
    number = {name: index for index, name in enumerate(classes)}
    chosen = {file: row for file, row in rows.items() if row.split == split}
    several = [tuple(sorted(number[label] for label in row.labels)) for row in chosen.values()]
    labels = several if columns.multi_label else [label for (label,) in several]
    groups = [row.group or file for file, row in chosen.items()] if columns.group else None
    return ImageFiles(root, list(chosen), labels, len(classes) if columns.multi_label else None, groups)


READERS = {"table": read}
