"""Reads only regular files, and writes files whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO

from filelock import FileLock

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import one_line, printable

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}  # what is no regular file


class NotRegular(OSError):
    """Means that a path to read is no regular file: a pipe could block for ever, a device could have no end."""


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file, or a link to one, to read its bytes.

    Raises NotRegular for anything else, OSError as open() does.
    """
    refuse_irregular(os.stat(path))
    # O_NONBLOCK, as another process may have put a pipe there since, and opening that would block
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        refuse_irregular(os.fstat(handle))
    except NotRegular:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def refuse_irregular(status: os.stat_result) -> None:
    """Raises NotRegular, which says what it is, for what is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(f"{KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")


def is_there(path: Path) -> bool:
    """Returns path.exists(), and False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def stamp(status: os.stat_result) -> list[int]:
    """Returns [size, mtime, ctime, inode], of which one differs once a file was written to or replaced."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a regular file, in hexadecimal. Raises OSError."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file that the user named, in hexadecimal. Raises UserError."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({reason(error)})") from error


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Makes runs that start together, as in a sweep, take turns at `name` in `folder`, which is made if need be.

    Raises UserError where the folder cannot be written to.
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


def reason(error: OSError) -> str:
    """Returns why a file could not be opened, without its name, which the message has beside it."""
    return error.strerror or one_line(error)


@contextlib.contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yields a file to write and read back, which takes the place of `path` when the context ends without an error.

    mode: the permissions of the file; None: those of any new file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")  # named before a signal can come
    try:
        with open(temporary, "x+b", opener=_of_the_owner) as file:  # who writes it may read it back
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # moved already
            os.unlink(temporary)
        raise


def _of_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: to a temporary file in the same folder, then moved into place."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
