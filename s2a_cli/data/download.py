"""Downloads the files of a data set: from several sources each, resumed, verified, and never half there.

The program knows the SHA-256 of each file, so a source need not be trusted.
"""

from __future__ import annotations

import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from s2a_cli import __version__
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import lock, sha256_of
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import one_line, size
from s2a_cli.data.archives import extract_once, is_extracted

TIMEOUT = 30.0  # seconds without a byte before a source counts as down
CHUNK = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A file that is the same wherever it comes from."""

    name: str
    bytes: int
    sha256: str
    urls: tuple[str, ...]  # tried in this order


class _Broken(Exception):
    """Says why a source did not deliver."""


def fetch(file: RemoteFile, folder: Path, download: bool = True) -> Path:
    """Returns the path of `file` in `folder`, verified, after a download from the first source that delivers.

    An interrupted download stays as NAME.part and is resumed, also from another source. A file that is there but
    differs is never overwritten. Raises UserError, which says which file to put where, when `download` is false or no
    source delivers.
    """
    path = folder / file.name
    if not path.exists():
        if not download:
            raise UserError(f"{path} is missing and dataset.download=false. {_by_hand(file, folder)}")
        with lock(folder, file.name):
            if not path.exists():
                _download(file, folder)
                return path
    if (found := sha256_of(path)) != file.sha256:
        raise UserError(
            f"{path} is not {file.name}: its SHA-256 is {found}, not {file.sha256}; remove it to fetch it anew"
        )
    return path


def fetch_tree(file: RemoteFile, folder: Path, download: bool = True) -> Path:
    """Returns the folder into which the archive `file` is extracted, after a download if need be.

    An archive that is gone is downloaded again only where the folder has no manifest of it. Raises UserError as `fetch`
    does, and where the folder was changed since.
    """
    tree = folder / file.name.split(".")[0]
    if not (tree.exists() and is_extracted(tree, file.sha256)):
        extract_once(fetch(file, folder, download), tree, file.sha256)
    return tree


def _download(file: RemoteFile, folder: Path) -> None:
    """Downloads a file from the first source that delivers. Raises UserError, with what each of them did."""
    part = folder / f"{file.name}.part"
    failures = []
    for url in file.urls:
        try:
            _complete(part, file, url)
        except _Broken as error:
            failures.append(f"{url}: {error}")
        else:
            part.replace(folder / file.name)
            return
    raise UserError(f"could not download {file.name} ({'; '.join(failures)}). {_by_hand(file, folder)}")


def _complete(part: Path, file: RemoteFile, url: str) -> None:
    """Downloads what `part` lacks of the file, and verifies it. Raises _Broken.

    A part with a wrong checksum is removed.
    """
    while True:
        before = _length(part)
        try:
            if before < file.bytes:
                _append(part, file, url, before)
        except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
            if _length(part) <= before:
                raise _Broken(one_line(error)) from error
            continue  # the connection broke off: go on from there
        if _length(part) == file.bytes and sha256_of(part) == file.sha256:
            return
        part.unlink()
        if not before:  # else an earlier attempt may have left something wrong: start over
            raise _Broken("sent another file than expected (wrong SHA-256)")


def _append(part: Path, file: RemoteFile, url: str, start: int) -> None:
    """Appends to `part` the bytes of a file from `start` on. Raises _Broken, OSError, HTTPException."""
    request = urllib.request.Request(url, headers={"User-Agent": f"s2a/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:
            start = 0  # a server that knows no ranges sends the whole file
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _Broken("sent another range than asked for")
        if response.length is not None and start + response.length != file.bytes:
            raise _Broken(f"offers {start + response.length} bytes instead of {file.bytes}")
        with open(part, "ab" if start else "wb") as stream, Progress(file.name, file.bytes, "B", start) as progress:
            while (chunk := response.read(CHUNK)) and stream.tell() <= file.bytes:
                stream.write(chunk)
                progress.add(len(chunk))
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)


def _length(path: Path) -> int:
    if not path.exists():
        return 0
    if not path.is_file():
        raise UserError(f"{path} is not a file: remove it")
    return path.stat().st_size


def _by_hand(file: RemoteFile, folder: Path) -> str:
    return f"Put {file.name} ({size(file.bytes)}, SHA-256 {file.sha256}) into {folder}/, from {' or '.join(file.urls)}"
