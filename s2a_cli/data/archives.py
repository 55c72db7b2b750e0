"""Extracts archives that may be damaged or hostile: plain files below the target folder, or nothing."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from s2a_cli.data.files import lock, one_line
from s2a_cli.progress import size
from s2a_cli.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
BLOWN_UP, LARGE = 200, 10**9  # times the archive's own size, and bytes: images do not pack that well
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError,
    NotImplementedError,  # a zip compressed by an unknown method
    RuntimeError,  # a zip with a password
)  # fmt: skip


def extract(archive: Path, target: Path) -> None:
    """Extracts `archive` (tar or zip) to the new folder `target`, in one step: it appears when it is complete.

    Raises UserError if the archive is damaged, does not fit on the disk, or holds anything but files and folders below
    `target`: absolute paths, "..", links, devices.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        _extract(archive, partial)
        partial.replace(target)
    except DAMAGED as error:
        raise UserError(
            f"{archive} cannot be unpacked ({one_line(error)}); it may be damaged: fetch it anew"
        ) from error
    except OSError as error:
        raise UserError(f"cannot extract {archive} to {target} ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract_once(archive: Path, target: Path) -> None:
    """Extracts `archive` to `target` unless that is there already. Two processes take turns."""
    with lock(target.parent, target.name):
        if not target.exists():
            extract(archive, target)


def _extract(archive: Path, folder: Path) -> None:
    packed, free, unpacked = archive.stat().st_size, shutil.disk_usage(folder).free, 0
    for name, bytes_, plain, write in _members(archive, folder):
        if not plain:
            raise UserError(f"{archive} is refused: {name!r} is a link or a device, not a file; nothing was kept")
        # both kinds of path, as tools on Windows write backslashes and drives
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            if path.is_absolute() or path.drive or ".." in path.parts:
                raise UserError(f"{archive} is refused: {name!r} points outside of the archive; nothing was kept")
        unpacked += bytes_
        if unpacked > free:
            raise UserError(f"{archive} does not fit: it needs more than the {size(free)} free in {folder.parent}")
        if unpacked > max(BLOWN_UP * packed, LARGE):
            raise UserError(f"{archive} is refused: its {size(packed)} unpack to over {size(unpacked)}")
        write()


def _members(archive: Path, folder: Path) -> Iterator[tuple]:
    """(name, bytes, whether it is a file or a folder, a function that writes it below `folder`) of each member."""
    if archive.name.lower().endswith(".zip"):  # not is_zipfile(): it also finds a zip at the end of a tar
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if made on Windows
                plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
                yield member.filename, member.file_size, plain, lambda m=member: packed.extract(m, folder)
    else:
        with tarfile.open(archive) as packed:
            for member in packed:
                plain = member.isreg() or member.isdir()
                yield member.name, member.size, plain, lambda m=member: packed.extract(m, folder, filter="data")
