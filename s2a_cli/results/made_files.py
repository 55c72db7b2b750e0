"""The files that commands make of results: which of them may be replaced, and what is safe in their cells."""

from __future__ import annotations

from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.text import utf8

MADE_BY = "s2a figure"  # in the files of figures
MAKER = {"svg": "Creator", "png": "Software", "pdf": "Creator"}  # what each kind of file calls the program that made it
OURS = (b"<title>s2a report</title>", b"<title>s2a predictions</title>", MADE_BY.encode())
FORMULA = ("=", "+", "-", "@")
PAGES = (".html", ".htm")


def safe_cell(value: object) -> object:
    """Returns what stands in a cell of a CSV: a text that a spreadsheet would run as a formula has a ' before it.

    What UTF-8 can't hold of a name stands there as an escape.
    """
    if not isinstance(value, str):
        return value
    return utf8(f"'{value}" if value.startswith(FORMULA) else value)


def save(path: Path, data: bytes | str, word: str, force: bool = False) -> None:
    """Writes a page or a figure under the name that the `word` of a command gave.

    Raises UserError when it can't be written, and without `force` when it would replace a file that is not one of ours.
    """
    check_out(path, word, force)
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(f"{word}={path}: can't be written ({error.strerror})") from None


def check_out(path: Path, word: str, force: bool = False) -> None:
    """Raises UserError for a path under which there is something else than a page or figure of ours, or no file."""
    try:
        if not path.exists() or (not path.stat().st_size and path.is_file()):
            return
        if not path.is_file():
            raise UserError(f"{word}={path}: is no file; expected the name of one")
        if not force and not any(mark in path.read_bytes() for mark in OURS):
            raise UserError(f"{word}={path}: is there, and was not made by s2a {word}=; --force overwrites it")
    except OSError as error:
        raise UserError(f"{word}={path}: can't be written ({error.strerror})") from None


def check_page(path: Path, word: str, force: bool = False) -> None:
    """Does what `check_out` does for a page, before the work whose results it shows.

    Raises UserError as well for another ending than that of HTML, and where there is no folder for it.
    """
    if path.suffix.lower() not in PAGES:
        raise UserError(f"{word}={path}: is a page; expected a file that ends in {' or '.join(PAGES)}")
    if not path.parent.is_dir():
        raise UserError(f"{word}={path}: there is no folder {path.parent}")
    check_out(path, word, force)
