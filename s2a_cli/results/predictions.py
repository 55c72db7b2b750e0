"""Predictions of photos as a person or a program reads them: lines, CSV, JSON, and a page of thumbnails."""

from __future__ import annotations

import base64
import csv
import heapq
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_file, is_there, reason
from s2a_cli.common.text import nearest, printable
from s2a_cli.results.made_files import safe_cell, save

SHOWN = 500  # photos of a page, at most
CSV_OPENS, JSON_OPENS = b"image,class,probability", b'[\n{"image": '  # what files of ours begin with


@dataclass(frozen=True)
class Prediction:
    """What a model says of a photo: (class, probability), the most probable first; or why it can't be read."""

    path: Path
    classes: list[tuple[str, float]]
    trouble: str = ""
    thumbnail: bytes = b""  # a JPEG, where it was asked for

    def line(self) -> str:
        """Returns the prediction as a line: `a.jpg: rose 97.3 %, tulip 1.9 %`."""
        said = ", ".join(f"{printable(name)} {100 * probability:.1f} %" for name, probability in self.classes)
        return f"{printable(self.path)}: {said}"


class Writer(Protocol):
    """Takes predictions one by one."""

    def add(self, prediction: Prediction) -> None: ...


class _Lines:
    """Prints a line a photo."""

    def add(self, prediction: Prediction) -> None:
        if not prediction.trouble:
            print(prediction.line())


class _Csv:
    """Writes image, class, probability, class_2, probability_2, ..., and why a photo can't be read."""

    def __init__(self, file: IO[bytes], top: int):
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._rows, self._top = csv.writer(self._text), top
        names = [["class", "probability"], *([f"class_{n}", f"probability_{n}"] for n in range(2, top + 1))]
        self._rows.writerow(["image", *itertools.chain(*names), "error"])

    def add(self, prediction: Prediction) -> None:
        cells = [[safe_cell(name), f"{probability:.6f}"] for name, probability in prediction.classes]
        cells += [["", ""]] * (self._top - len(cells))
        self._rows.writerow([safe_cell(str(prediction.path)), *itertools.chain(*cells), prediction.trouble])

    def end(self) -> None:
        self._text.detach()


class _Json:
    """Writes a list of {"image", "classes": [{"class", "probability"}]}, or of {"image", "error"}."""

    def __init__(self, file: IO[bytes], top: int):
        self._file, self._before = file, "[\n"

    def add(self, prediction: Prediction) -> None:
        said: dict[str, object] = {"image": str(prediction.path)}
        if prediction.trouble:
            said["error"] = prediction.trouble
        else:
            said["classes"] = [{"class": name, "probability": round(p, 6)} for name, p in prediction.classes]
        self._file.write(f"{self._before}{json.dumps(said)}".encode())
        self._before = ",\n"

    def end(self) -> None:
        self._file.write(b"\n]\n" if self._before == ",\n" else b"[]\n")


KINDS = {".csv": _Csv, ".json": _Json}


def check_out(path: Path, force: bool) -> None:
    """Raises UserError for an ending that no file of predictions has, and for a file that is not of predictions."""
    if path.suffix not in KINDS:
        raise UserError(f"out={path}: expected a file that ends in .csv or .json{nearest(path.suffix, KINDS)}")
    if not path.parent.is_dir():
        raise UserError(f"out={path}: there is no folder {path.parent}")
    if is_there(path) and not path.is_file():
        raise UserError(f"out={path}: is no file; expected the name of one")
    if is_there(path) and not force:
        with path.open("rb") as file:
            begins = file.read(len(CSV_OPENS))
        if begins and begins not in (CSV_OPENS, JSON_OPENS[: len(begins)]):
            raise UserError(f"out={path}: is there, and holds no predictions; --force overwrites it")


@contextmanager
def writer(out: Path | None, top: int) -> Iterator[Writer]:
    """Yields what takes predictions: of a CSV or JSON file, which is there when the context ends without an error.

    out: None prints a line a photo.
    """
    if out is None:
        yield _Lines()
        return
    try:
        with atomic_file(out) as file:
            made = KINDS[out.suffix](file, top)
            yield made
            made.end()
    except BrokenPipeError:  # of what is printed meanwhile
        raise
    except OSError as error:
        raise UserError(f"out={out}: can't be written ({reason(error)})") from None


class Gallery:
    """A page of thumbnails with what was predicted, the least certain first.

    Of more than SHOWN photos it keeps the least certain.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, Prediction]] = []  # a heap whose first is the most certain
        self._count, self._unreadable = 0, []

    def add(self, prediction: Prediction) -> None:
        if prediction.trouble:
            self._unreadable.append(f"{printable(prediction.path)}: {prediction.trouble}")
            return
        self._count += 1
        entry = -prediction.classes[0][1], -self._count, prediction
        if len(self._kept) < SHOWN:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def save(self, path: Path, title: str, force: bool) -> None:
        """Writes the page. Raises UserError as made_files.save does."""
        from s2a_cli.results import pages  # which draws, and takes a second to import

        kept = [prediction for _, _, prediction in sorted(self._kept, reverse=True)]
        page = pages.render(
            "predictions.html",
            title=title,
            count=self._count,
            unreadable=self._unreadable,
            photos=[
                {
                    "name": printable(prediction.path),
                    "source": f"data:image/jpeg;base64,{base64.b64encode(prediction.thumbnail).decode()}",
                    "classes": [(printable(name), f"{100 * p:.1f}") for name, p in prediction.classes],
                }
                for prediction in kept
            ],
        )
        save(path, page, "gallery", force)
