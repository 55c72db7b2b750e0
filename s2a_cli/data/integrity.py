"""Reads every file of a folder once, to find damaged images and to hash the data as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import cast

import PIL

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import NotRegular, atomic_write, open_regular, reason, stamp
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import listed, one_line, printable, size
from s2a_cli.data.images import FORMATS, open_rgb

SCHEMA = 3  # of the kept reports
LARGEST = 2 << 30  # bytes of a file; Pillow refuses images of so many pixels that they would be larger
DARK = 16  # of 255, below which all values lie where a file of 16 bits holds 12


@dataclass(frozen=True)
class Report:
    """A report on the files of a folder. Its fields are the keys of the file in which it is kept."""

    revision: str  # 12 hex digits of a hash of relative paths and contents, wherever the folder lies
    damaged: dict[str, str]  # relative path: why it cannot be decoded
    dark: list[str]  # images without a value of DARK or more
    digests: dict[str, str]  # relative path of an image that can be decoded: 16 hex digits of its SHA-256

    @property
    def same(self) -> list[list[str]]:
        """Groups of files with the same bytes."""
        by_digest: dict[str, list[str]] = {}
        for file, digest in self.digests.items():
            by_digest.setdefault(digest, []).append(file)
        return [group for group in by_digest.values() if len(group) > 1]

    def refuse_damaged(self, root: Path, extracted: bool = False) -> None:
        """Raises UserError where an image can't be decoded. extracted: whether the folder was made from an archive."""
        if not self.damaged:
            return
        (first, why), *more = self.damaged.items()
        others = f", and {len(more)} more: {listed([file for file, _ in more])}" if more else ""
        advice = "make its archive anew without it" if extracted else "mend or remove it"
        raise UserError(
            f"{printable(root / first)} is not a readable image ({why}){others}; "
            f"{advice}, or leave such images out with dataset.on_corrupt=skip"
        )

    def left_out(self) -> list[str]:
        """Returns a phrase on the images that can't be decoded."""
        if not self.damaged:
            return []
        first = [f"{file}: {why}" for file, why in self.damaged.items()]
        return [f"{len(first)} that can't be read ({listed(first, 10)})"]

    def notes(self) -> list[str]:
        """Returns a sentence on images that look wrong."""
        if not self.dark:
            return []
        return [
            f"nearly black: {len(self.dark)} ({listed(self.dark, 3)}): no value reaches {DARK} of 255;"
            " do these files hold fewer bits than they have room for?"
        ]


def merged(reports: Mapping[Path, Report], root: Path) -> Report:
    """Returns the reports on several folders as one; files of another folder than `root` have absolute paths."""
    if list(reports) == [root]:
        return reports[root]

    def path(folder: Path, file: str) -> str:
        return file if folder == root else str(folder / file)

    revisions = " ".join(report.revision for report in reports.values())
    return Report(
        sha256(revisions.encode()).hexdigest()[:12],
        {path(folder, file): why for folder, report in reports.items() for file, why in report.damaged.items()},
        [path(folder, file) for folder, report in reports.items() for file in report.dark],
        {path(folder, file): digest for folder, report in reports.items() for file, digest in report.digests.items()},
    )


def examine(root: Path, files: Sequence[str], cache: Path) -> Report:
    """Decodes and hashes `files` (sorted relative paths under `root`), on threads, and shows the progress.

    The report is kept in `cache` under a hash of all names, sizes, times and inodes, so that each state of a folder is
    read once. A file that cannot be opened counts as damaged.
    """
    seen = _state(root, files)
    kept = cache / f"{seen}.json"
    if found := _kept(kept):
        return found
    report, lasting = _read_all(root, files)
    if not lasting or _state(root, files) != seen:  # it changed while it was read: this state will not come back
        return report
    try:
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps(asdict(report)))
    except OSError:
        pass  # a cache that cannot be written costs time, no more
    return report


def _state(root: Path, files: Sequence[str]) -> str:
    """Returns a hash of the names, sizes, times and inodes of files, and of what decodes them."""
    seen = sha256(f"{SCHEMA} {PIL.__version__} {FORMATS} ".encode())
    seen.update(os.fsencode(root.resolve()))
    for file in files:
        try:
            status = os.stat(root / file)
            about = f"{status.st_mode} {stamp(status)}"
        except OSError as error:  # a link to nothing, for one
            about = reason(error)
        except ValueError as error:  # a name that no file can have
            about = str(error)
        seen.update(f"\0{file}\0{about}".encode("utf-8", "surrogateescape"))
    return seen.hexdigest()[:32]


def _kept(path: Path) -> Report | None:
    """Returns the report that a file holds, or None where it is missing or damaged."""
    try:
        with open_regular(path) as stream:
            report = Report(**json.load(stream))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = ((report.revision, str), (report.damaged, dict), (report.dark, list), (report.digests, dict))
    return report if all(isinstance(value, kind) for value, kind in kinds) else None


def _read_all(root: Path, files: Sequence[str]) -> tuple[Report, bool]:
    """Returns the report, and whether it holds until a file changes: not where one could not be opened for now."""
    content, damaged, dark, digests, lasting = sha256(), {}, [], {}, True
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1))  # decoders release the interpreter's lock
    try:
        with Progress(f"checking {root.name}", len(files), "images") as progress:
            for file, found in zip(files, pool.map(lambda file: _read(root / file), files)):
                content.update(f"{file}\0{found.digest}\0".encode("utf-8", "surrogateescape"))
                if found.trouble:
                    damaged[file] = found.trouble
                if found.dark:
                    dark.append(file)
                if found.digest and not found.trouble:
                    digests[file] = found.digest[:16]
                lasting &= found.lasting
                progress.add(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return Report(content.hexdigest()[:12], damaged, dark, digests), lasting


@dataclass(frozen=True)
class _File:
    """A report on one file."""

    digest: str = ""  # SHA-256; empty where it was not read
    trouble: str | None = None  # why it is no image
    dark: bool = False  # no value reaches DARK
    lasting: bool = True  # whether a second look at the unchanged file would find the same


def _read(path: Path) -> _File:
    try:
        with open_regular(path) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length > LARGEST:
                return _File(trouble=f"{size(length)}, more than an image has")
            digest = file_digest(stream, "sha256").hexdigest()
    except (NotRegular, ValueError) as error:  # a name that no file can have
        return _File(trouble=one_line(error))
    except FileNotFoundError:
        return _File(trouble="a link to what is not there" if path.is_symlink() else "it is gone")
    except OSError as error:
        return _File(trouble=reason(error), lasting=False)
    try:
        image = open_rgb(path)
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        return _File(digest, one_line(error))
    extrema = cast(tuple[tuple[int, int], ...], image.getextrema())  # (least, most) of each channel of an RGB image
    return _File(digest, dark=max(most for _, most in extrema) < DARK)
