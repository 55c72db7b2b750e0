"""A run's folder: what may lie in it, who is at it, and how a finished run is replaced without being lost.

A finished run stays as it is until its replacement is whole, which is built in NEXT, a folder inside the run's. The new
run counts from the moment in which its record there says ok. Then its files are moved into place, by the next process
that opens the folder if this one is killed meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line, listed
from s2a_cli.results import made_files, record

LOCK = ".lock"  # held by the process that is at the run
NEXT = ".next"
LOOKING = 1.0  # seconds; a sweep that looks at a run has its folder for a moment
RECORD, CONFIG, METRICS, TRACEBACK = "result.json", "config.yaml", "metrics.jsonl", "traceback.txt"
TENSORS, STATE = "trainable.safetensors", "state.pt"
TEST_FILES = "test_files.json"
LOG, JOBS = "log.txt", "slurm"  # of a sweep
PAGE = "report.html"  # of s2a report
EVALUATION = re.compile(r"evaluation(-.*)?")  # folders of s2a eval
FILES = (RECORD, CONFIG, METRICS, TRACEBACK, TENSORS, STATE, TEST_FILES, LOG, "job.json", "memory_snapshot.pickle")
LITTER = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.[a-z0-9_]{{8}}")  # temporary files of `atomic_write`
BEFORE_A_RECORD = (LOCK, LOG, JOBS, NEXT)  # what there may be of a run that was killed before it wrote its first file


def make_run_dir(path: Path) -> Path:
    """Creates a run's folder. Raises UserError when nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"run_dir={path}: can't be written to ({error.strerror}); set run_dir= to a folder that can"
        ) from None
    return path


def check_run_dir(path: Path) -> None:
    """Raises UserError for a folder that holds something and no run: its files are somebody's."""
    try:
        found = sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):  # to be made, or not to be made
        return
    except OSError as error:
        raise UserError(f"run_dir={path}: can't be used ({error.strerror}); set run_dir= to a folder") from None
    found = [name for name in found if name not in BEFORE_A_RECORD and not LITTER.fullmatch(name)]
    if not found or _holds_record(path / RECORD):
        return
    strangers = [name for name in found if name not in FILES and not name.startswith("events.out.tfevents")]
    if not strangers and (path / LOCK).exists():  # a run whose record is damaged
        return
    names = listed(sorted(found, key=lambda name: name not in strangers), 3)
    raise UserError(
        f"run_dir={path}: holds {names}, and no run; set run_dir= to a new or an empty folder, or to that of a run"
    )


def _holds_record(path: Path) -> bool:
    """Returns whether the file is a record, of whatever schema and however wrong its values are."""
    try:
        found = json.loads(record.regular(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema", "config"} <= found.keys()


def usable(folder: Path) -> list[Path]:
    """Creates a run's folder, and returns it and those above that were not there, for `remove_empty`.

    Raises UserError for one in which no run can be made and none is finished.
    """
    check_run_dir(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        make_run_dir(folder)
    except UserError:
        if not is_finished(folder):
            raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Removes folders in which there is nothing, such as that of a run whose checkpoint turned out to be damaged."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class Busy(UserError):
    """Another process is at a run."""

    code = 75  # EX_TEMPFAIL: the input is not at fault, later it may go


@contextlib.contextmanager
def claimed(folder: Path, wait: float = 0) -> Iterator[None]:
    """Keeps other processes from running what this folder is for; the system frees it when the process is killed.

    Completes what a killed process has left half-moved, and removes its temporary files. Raises Busy when another
    process has the folder, and still has it after `wait` seconds. Raises UserError where it can't be locked, as on a
    read-only disk.
    """
    held = FileLock(folder / LOCK)
    try:
        if (folder / LOCK).is_symlink():
            raise OSError(0, "its .lock is a link")
        held.acquire(timeout=wait)
    except Timeout:
        raise Busy(
            f"{folder}: another process is at this run; wait for it, or set run_dir= to another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: can't be locked ({error.strerror or first_line(error)})") from None
    try:
        settle(folder)
        for place in (folder, folder / NEXT):
            _remove_litter(place)
        yield
    finally:
        held.release()


def _remove_litter(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        for name in filter(LITTER.fullmatch, os.listdir(folder)):
            (folder / name).unlink(missing_ok=True)


def at_work(folder: Path) -> bool:
    """Returns whether a process is at the run of this folder: whether it holds the lock.

    Changes nothing, on a read-only disk either.
    """
    try:
        import fcntl

        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError | PermissionError)
    finally:
        os.close(handle)
    return False


def claim(folder: Path, content: str, force: bool, until: contextlib.ExitStack) -> Path | None:
    """Claims the folder of a run for this process, and returns where in it the run is to be made, see place."""
    usable(folder)
    try:
        until.enter_context(claimed(folder, wait=LOOKING))
    except UserError as error:  # a read-only disk
        if isinstance(error, Busy) or force or not record.finished(folder, content):
            raise
        return None
    return place(folder, content, force)


def place(folder: Path, content: str, force: bool) -> Path | None:
    """Returns where a run is to be made: the folder, which is claimed, or NEXT in it while a finished run stays.

    content: see record.content. Returns None where the run is finished already, and not to be made once more by
    `force`. Raises UserError for a folder that holds no run, and without `force` for one with something trained under
    another config.
    """
    check_run_dir(folder)
    if (folder / NEXT).is_symlink():
        raise UserError(f"{folder / NEXT}: is a link; remove it")
    trained = [name for name in (TENSORS, STATE) if (folder / name).exists()]
    try:
        found = record.read_result(folder)
    except UserError as error:
        if not trained:
            return folder
        if not force and folder.name != record.run_id(content):
            raise UserError(
                f"{first_line(error, 400)}: it is not known which run this is; --force trains anew"
            ) from None
        print(
            f"s2a: {first_line(error, 400)}: trained anew, the old files stay until the new ones are whole",
            file=sys.stderr,
        )
        return folder / NEXT
    same = record.content_of(found) == content
    if found["status"] != "ok":
        if not (same or force) and trained:
            raise UserError(_another(folder, found, content, "an unfinished run"))
        return folder
    if force or pending(folder, content):
        return folder / NEXT
    if not same:
        raise UserError(_another(folder, found, content, "a finished run"))
    (folder / STATE).unlink(missing_ok=True)  # of a process that was killed behind its last write
    return None


def _another(folder: Path, found: record.Result, content: str, kind: str) -> str:
    told = "; ".join(record.differences(record.content_of(found), content)[:3])
    return (
        f"run_dir={folder}: holds {kind} of another config ({told}); --force replaces it, or set run_dir= to another"
        " folder"
    )


def is_finished(folder: Path) -> bool:
    """Returns whether the folder holds a finished run, of whatever config."""
    try:
        return record.read_result(folder)["status"] == "ok"
    except UserError:
        return False


def pending(folder: Path, content: str) -> bool:
    """Returns whether a replacement of the finished run in this folder was begun for `content`, and broken off."""
    if (folder / NEXT).is_symlink():
        return False
    try:
        begun = record.read_result(folder / NEXT)
    except UserError:
        return False
    return begun["status"] == "interrupted" and record.content_of(begun) == content


def state(folder: Path, content: str) -> tuple[str, str | None]:
    """Returns how far a folder is with the run that `content` is of, and why its record can't be read, if it can't.

    That is new, done, failed, oom, interrupted or running.
    """
    if not folder.is_dir():
        return "new", None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder))
        except Busy:
            return "running", None
        except UserError:  # a read-only disk
            pass
        try:
            found = record.read_result(folder)
        except record.NoResult:
            return "new", None
        except UserError as error:
            return "new", str(error)
        if record.content_of(found) != content:
            return "new", None
        if found["status"] != "ok":
            return found["status"], None
        return "interrupted" if pending(folder, content) else "done", None


def settle(folder: Path) -> None:
    """Moves a replacement that is whole into place, its record last.

    Goes on where a process was killed in the middle of it.
    """
    begun = folder / NEXT
    if begun.is_symlink() or not is_finished(begun):
        return
    with contextlib.suppress(FileNotFoundError):  # another process does the same
        remove_made(folder)
        for name in (folder / STATE, folder / TRACEBACK, begun / STATE):
            name.unlink(missing_ok=True)
        for name in sorted(os.listdir(begun), key=lambda name: name == RECORD):
            os.replace(begun / name, folder / name)
        begun.rmdir()


def remove_made(folder: Path) -> None:
    """Removes what `s2a eval` and `s2a report` made in the folder of a run that is replaced, and nothing else there."""
    from s2a_cli.results import evaluation  # takes a while to import

    for place in folder.iterdir():
        if EVALUATION.fullmatch(place.name) and place.is_dir() and not place.is_symlink():
            for name in evaluation.FILES:
                (place / name).unlink(missing_ok=True)
            remove_empty([place])
    if (folder / PAGE).is_file() and any(mark in (folder / PAGE).read_bytes() for mark in made_files.OURS):
        (folder / PAGE).unlink()
