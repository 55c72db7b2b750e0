"""Small things about files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from s2a_cli.errors import UserError


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Makes runs that start together, as in a sweep, take turns at `name` in `folder`, which is created if need be.

    Raises UserError if the folder cannot be written to.
    """
    held = FileLock(folder / f".{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({one_line(error)}); point dataset.root or S2A_DATA elsewhere"
        ) from None
    try:
        yield
    finally:
        held.release()


def one_line(error: BaseException) -> str:
    """The text of an exception, on one line; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
