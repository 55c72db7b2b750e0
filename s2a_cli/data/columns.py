"""Finds in a table of images the columns of paths, labels and splits, and reads them."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import reason
from s2a_cli.common.text import brief, first_line, listed, nearest, printable
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.images import EXTENSIONS
from s2a_cli.data.layout import SPLITS, meant_split

# Names of columns in lower case, without what stands between words.
IMAGES = {
    *("image", "images", "path", "file", "filename", "filepath", "imagepath", "imagefile", "imagename", "imageid"),
    *("img", "photo", "picture"),
}
LABELS = {
    *("label", "labels", "class", "classes", "classname", "category", "categories", "species", "target", "targets"),
    *("tag", "tags"),
}
SPLIT = {"split", "splits", "datasplit"}
MAYBE_SPLIT = {"subset", "partition", "set"}  # or something else
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
TABLES = (".csv", ".tsv", ".parquet", ".pq")
TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
LOOKED_AT = 200  # cells of a column, by which it is known


@dataclass(frozen=True)
class Columns:
    """The columns of a table. Either `label` or `classes` is set; `separator` stands between the labels of a cell."""

    image: str
    label: str | None
    classes: tuple[str, ...]
    split: str | None
    group: str | None
    separator: str | None
    multi_label: bool
    unused: tuple[str, ...]

    def values(self, frame: pd.DataFrame) -> Iterator[tuple[str, list[str], str | None, str | None]]:
        """Yields (path, labels, split, group) of each line; an empty path, None for a missing split or group.

        Raises UserError for a split that is none, and for several labels where there can be but one.
        """
        empty = [None] * len(frame)
        labels: Iterable[list[str]]
        if self.label is not None:
            labels = (_labels(cell, self.separator) for cell in frame[self.label])
        else:
            marks = _marks(frame, self.classes)
            labels = ([self.classes[index] for index in np.flatnonzero(line)] for line in marks)
        splits = empty if self.split is None else frame[self.split]
        groups = empty if self.group is None else frame[self.group]
        lines = zip(frame.index + 2, frame[self.image], labels, splits, groups)
        for line, image, of_image, split, group in lines:
            if len(of_image) > 1 and not self.multi_label:
                raise UserError(
                    f"line {line} has the labels {listed(of_image)}, but dataset.multi_label=false allows but one"
                )
            yield _text(image), of_image, self._split_of(split, line), _text(group) or None

    def _split_of(self, cell: Any, line: int) -> str | None:
        text = _text(cell)
        if text and text.lower() not in SPLIT_OF:
            raise UserError(
                f"dataset.split_column={self.split}: line {line} has {brief(text)!r}; expected train, val or test, or"
                " another name of the column where it is about something else"
            )
        return SPLIT_OF.get(text.lower())

    def describe(self) -> str:
        """Returns which columns are read as what."""
        labels = f"labels {self.label!r}" if self.label else f"a class each {listed(map(repr, self.classes))}"
        found = [f"images {self.image!r}", labels]
        found += [f"splits {self.split!r}"] if self.split else []
        found += [f"groups {self.group!r}"] if self.group else []
        found += [f"not used {listed(map(repr, self.unused))}"] if self.unused else []
        return ", ".join(found)


def read_frame(path: Path) -> pd.DataFrame:
    """Returns the table in a file; the cells of a CSV or TSV are texts. Raises UserError where there is none.

    Line i + 2 of the file is that of index i.
    """
    if not path.name.lower().endswith(TABLES):
        raise UserError(f"dataset.file={printable(path)}: expected a file that ends in {', '.join(TABLES)}")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = pd.read_parquet(path).reset_index(drop=True)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
                file.seek(0)
                _check_fields(csv.reader(file, delimiter=separator))
            frame = pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig"
            )
            frame = frame.drop(frame.index[(frame == "").all(axis=1)])  # blank lines, which the index counts
    except ImportError:
        raise UserError(
            f"dataset.file={printable(path)}: Parquet needs a package: pip install 's2a[parquet]'"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"dataset.file={printable(path)}: is not in UTF-8; save it as CSV in UTF-8") from None
    except OSError as error:
        raise UserError(f"dataset.file={printable(path)}: can't be read ({reason(error)})") from None
    except Exception as error:  # pandas and pyarrow have kinds of their own for what is no table
        raise UserError(f"dataset.file={printable(path)}: is no table ({first_line(error)})") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    if not len(frame):
        raise UserError(f"dataset.file={printable(path)}: has no lines below its header")
    if names := [name for name in frame.columns if name.lower().endswith(EXTENSIONS)]:
        raise UserError(f"dataset.file={printable(path)}: begins with {names[0]!r}, not with the names of columns")
    if twice := sorted({name for name in frame.columns if list(frame.columns).count(name) > 1}):
        raise UserError(f"dataset.file={printable(path)}: has several columns {listed(map(repr, twice))}")
    return frame


def _check_fields(rows: Any) -> None:
    """Raises ValueError for a line of a csv.reader with more fields than the header, by which pandas shifts columns."""
    names = next(rows, [])
    for row in rows:
        if len(row) > len(names):
            raise ValueError(f"line {rows.line_num} has {len(row)} fields, the header {len(names)}")


def find_columns(frame: pd.DataFrame, path: Path, config: DatasetConfig) -> Columns:
    """Returns the columns that the settings name, and finds the others by their names and what is in them.

    Raises UserError for a name that is not there, and where none or several could be meant.
    """
    names = list(frame.columns)

    def named(setting: str, name: str) -> str:
        if name not in names:
            raise UserError(
                f"dataset.{setting}={printable(name)}: {printable(path.name)} has no such column, but"
                f" {listed(names, 12)}{nearest(name, names)}"
            )
        return name

    group = named("hold_out", config.hold_out) if config.hold_out else None
    taken = (config.hold_out, config.image_column, config.label_column, *(config.class_columns or ()))
    split = named("split_column", config.split_column) if config.split_column else _found_split(frame, path, taken)
    image = named("image_column", config.image_column) if config.image_column else _found_image(frame, path)
    rest = [name for name in names if name not in (image, split, group)]
    rest = [name for name in rest if _plain(name) not in SPLIT | MAYBE_SPLIT]
    label, classes = None, ()
    if config.class_columns:
        classes = tuple(named("class_columns", name) for name in config.class_columns)
        if twice := [name for name in dict.fromkeys(classes) if classes.count(name) > 1]:
            raise UserError(f"dataset.class_columns: {listed(map(repr, twice))} more than once")
    elif config.label_column:
        label = named("label_column", config.label_column)
    else:
        label, classes = _found_labels(frame, rest, path)
    for name in classes:
        if odd := [_text(cell) for cell in frame[name] if _truth(cell) is None]:
            raise UserError(f"dataset.class_columns: column {name!r} has {brief(odd[0])!r}; expected 0 or 1")
    unused = tuple(name for name in names if name not in (image, label, split, group, *classes))
    return Columns(image, label, classes, split, group, *_several(frame, label, classes, config), unused)


def count_classes(path: Path, config: DatasetConfig) -> int:
    """Returns how many classes a table names, without a look at the images; 0 where it is not there."""
    if not path.is_file():
        return 0
    frame = read_frame(path)
    columns = find_columns(frame, path, config)
    return len(columns.classes) or len({label for _, labels, *_ in columns.values(frame) for label in labels})


def _several(
    frame: pd.DataFrame, label: str | None, classes: tuple[str, ...], config: DatasetConfig
) -> tuple[str | None, bool]:
    """Returns what separates labels in a cell, and whether an image can have several of them.

    Raises UserError where one and several labels are possible.
    """
    if label is None:
        one_each = bool((_marks(frame, classes).sum(1) == 1).all())
        return None, not one_each if config.multi_label is None else config.multi_label
    cells = list(frame[label])
    lists = any(_is_list(cell) for cell in cells)
    if config.separator or lists or config.multi_label is not None:
        several = bool(config.separator or lists) if config.multi_label is None else config.multi_label
        return config.separator, several
    for mark in ("|", ";"):
        if odd := next((text for text in map(_text, cells) if mark in text), None):
            raise UserError(
                f"column {label!r} has {brief(odd)!r}: for several labels an image, say"
                f" 'dataset.separator=\"{mark}\"'; for one label, dataset.multi_label=false"
            )
    return None, False


def _found_image(frame: pd.DataFrame, path: Path) -> str:
    files = [name for name in frame if _share(frame[name], lambda text: text.lower().endswith(EXTENSIONS)) > 0.5]
    by_name = [name for name in files or frame if _plain(name) in IMAGES]
    if len(files) == 1 or len(by_name) == 1:
        return files[0] if len(files) == 1 else by_name[0]
    said = f"several columns of images: {listed(by_name or files)}" if files or by_name else "no column of image paths"
    raise UserError(f"{printable(path.name)} has {said}; say which: dataset.image_column=, of {listed(frame, 12)}")


def _found_split(frame: pd.DataFrame, path: Path, taken: Iterable[str | None]) -> str | None:
    """Returns a column that is called split, or one of a like name that seems to name some; None without one.

    A cell in it that names none is refused later: without the column, test images would be trained on.
    """
    names = [name for name in frame if _plain(name) in SPLIT | MAYBE_SPLIT and name not in taken]
    cells = {name: {_text(cell) for cell in frame[name]} - {""} for name in names}
    found = [name for name in names if any(cell.lower() in SPLIT_OF for cell in cells[name])]
    if not found:  # 0 and 1, or train_set and test_set
        found = [
            name for name in names if cells[name] and (_plain(name) in SPLIT or all(map(meant_split, cells[name])))
        ]
    if len(found) > 1:
        raise UserError(
            f"{printable(path.name)} has several columns of splits: {listed(found)}; say which: dataset.split_column="
        )
    return found[0] if found else None


def _found_labels(frame: pd.DataFrame, rest: list[str], path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Returns a column of labels, or columns of 0 and 1."""
    by_name = [name for name in rest if _plain(name) in LABELS]
    if len(by_name) == 1 or (len(rest) == 1 and not by_name):
        return (by_name or rest)[0], ()
    truths = tuple(name for name in rest if all(_truth(cell) is not None for cell in frame[name]))
    if not by_name and len(truths) > 1:
        return None, truths
    said = f"several columns of labels: {listed(by_name)}" if by_name else "no column that is called label or class"
    raise UserError(
        f"{printable(path.name)} has {said}; say which: dataset.label_column=, or dataset.class_columns=[...] of 0 and"
        f" 1, of {listed(rest, 12) or 'none that is left'}"
    )


def _share(cells: Iterable[Any], test: Callable[[str], bool]) -> float:
    """Returns the share of the first cells that are not empty which pass a test."""
    texts = [text for text in map(_text, cells) if text][:LOOKED_AT]
    return sum(map(test, texts)) / len(texts) if texts else 0.0


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _text(cell: Any) -> str:
    """Returns a cell as text, a missing one as an empty text, and a whole number without a point."""
    if cell is None or (isinstance(cell, float) and np.isnan(cell)) or cell is pd.NA:
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def _truth(cell: Any) -> int | None:
    """Returns 0 or 1; None for another cell."""
    return TRUTH.get(_text(cell).lower())


def _marks(frame: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """Returns columns of 0 and 1 as integers [lines, columns]."""
    return np.array([[_truth(cell) for cell in frame[name]] for name in names], dtype=np.int64).T


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list | tuple | np.ndarray) or (isinstance(cell, str) and _listed(cell) is not None)


def _listed(text: str) -> list[Any] | None:
    """Returns a list that is written as JSON or as Python writes it; None for another text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else None
    return None


def _labels(cell: Any, separator: str | None) -> list[str]:
    """Returns the labels in a cell, each once."""
    several = _listed(cell) if isinstance(cell, str) else cell if isinstance(cell, list | tuple | np.ndarray) else None
    if several is None:
        several = _text(cell).split(separator) if separator else [cell]
    return list(dict.fromkeys(text for text in map(_text, several) if text))
