"""Reads every file of a folder once: which images are damaged, and what identifies the data as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from s2a_cli.data.files import one_line
from s2a_cli.data.images import open_rgb
from s2a_cli.progress import Progress
from s2a_cli.errors import UserError
from s2a_cli.records import atomic_write


@dataclass(frozen=True)
class Report:
    revision: str  # 12 hex digits: relative paths and contents, wherever the folder lies
    damaged: dict[str, str]  # relative path: why it cannot be decoded


def examine(root: Path, files: Sequence[str], cache: Path) -> Report:
    """Decodes and hashes `files` (sorted relative paths under `root`), on threads, with progress.

    The report is kept in `cache` under a hash of all names, sizes and times, so that each state of a folder is read
    once. Raises UserError for a file that cannot be read at all.
    """
    seen = sha256(str(root.resolve()).encode())
    for file in files:
        try:
            status = (root / file).stat()
        except OSError as error:
            raise UserError(f"{root / file} cannot be read ({one_line(error)})") from error
        seen.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    kept = cache / f"{seen.hexdigest()[:32]}.json"
    try:
        return Report(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        report = _read_all(root, files)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps(asdict(report)))
    except OSError:
        pass  # a cache that cannot be written costs time, no more
    return report


def _read_all(root: Path, files: Sequence[str]) -> Report:
    content, damaged = sha256(), {}
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1))  # decoders release the interpreter's lock
    try:
        with Progress(f"checking {root.name}", len(files), "images") as progress:
            for file, (digest, trouble) in zip(files, pool.map(lambda file: _read(root / file), files)):
                content.update(f"{file}\0{digest}\0".encode("utf-8", "surrogateescape"))
                if trouble:
                    damaged[file] = trouble
                progress.add(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return Report(content.hexdigest()[:12], damaged)


def _read(path: Path) -> tuple[str, str | None]:
    try:
        digest = sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error
    try:
        open_rgb(path)
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        return digest, one_line(error)
    return digest, None
