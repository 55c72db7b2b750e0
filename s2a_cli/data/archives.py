"""Extracts archives that may be damaged or hostile: plain files below the target folder, or nothing.

What an archive held is remembered in the folder made of it, which is compared with that whenever it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, BinaryIO

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import NotRegular, atomic_write, lock, open_regular, sha256, stamp
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import listed, one_line, printable, size

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
BLOWN_UP, LARGE = 200, 10**9  # times the archive's own size, and bytes: images do not pack that well
BLOCK = 4096  # bytes that the smallest file takes on a disk
HEADER = 16 << 10  # bytes of a long name or of extended attributes in a tar, which are read at once; paths end at 4096
READ_AT_ONCE = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
CHUNK = 1 << 20
MANIFEST = (
    ".s2a-extracted.json"  # in the folder: {"archive": SHA-256, "files": {name: [SHA-256, size, mtime, ctime, inode]}}
)
CHECK = "remove that folder to have it extracted anew"


def extract(archive: Path, target: Path, digest: str | None = None) -> None:
    """Extracts `archive` (tar or zip, of that SHA-256) to the new folder `target`, in one step: it appears when it is
    complete.

    Raises UserError if the archive is damaged, does not fit on the disk, or holds anything but files and folders below
    `target`: absolute paths, "..", links, devices.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        held = _read(archive, partial)
        files = {name: [held[name], *stamp(status)] for name, status in _files(partial).items()}
        _remember(partial, digest or sha256(archive), files)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"cannot extract {archive} to {target} ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract_once(archive: Path, target: Path, digest: str | None = None) -> None:
    """Extracts `archive` to `target` unless that is there already, as the archive has it. Two processes take turns.

    Raises UserError as `extract` does, and where the folder is no longer what the archive held.
    """
    digest = digest or sha256(archive)
    if not target.exists():
        with lock(target.parent, target.name):
            if not target.exists():
                return extract(archive, target, digest)
    if not whole(target, digest):
        # extracted before this was remembered, or the file was lost
        files = {name: [held, -1, 0, 0, 0] for name, held in _read(archive, None).items()}
        _compare(target, digest, files)


def whole(target: Path, digest: str) -> bool:
    """Whether `target` was extracted from the archive of this SHA-256, as far as is remembered there.

    Raises UserError if it was and files have changed, are missing or were added. Files are read again only where their
    size, times or inode are others than before.
    """
    try:
        with open_regular(target / MANIFEST) as stream:
            kept = json.load(stream)
        files = {str(name): [str(held), *map(int, seen)] for name, (held, *seen) in kept["files"].items()}
        if kept["archive"] != digest or any(len(about) != 5 for about in files.values()):
            return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    _compare(target, digest, files)
    return True


def _compare(target: Path, digest: str, files: dict[str, list]) -> None:
    """Compares a folder with `files`, name -> [SHA-256, size, ...] (-1: not known), and remembers what was seen of
    them.
    """
    found = _files(target)
    wrong = [f"{name} is missing" for name in files if name not in found]
    wrong += [
        f"{name} was added" for name in found if name not in files and not PurePosixPath(name).name.startswith(".")
    ]
    changed = {
        name: stamp(status) for name, status in found.items() if name in files and files[name][1:] != stamp(status)
    }
    with Progress(f"checking {target.name}", len(changed), "files") as progress:
        for name, now in changed.items():
            held, before = files[name][:2]
            try:
                same = before in (-1, now[0]) and sha256(target / name) == held
            except OSError:  # a link or a pipe where a file was, or no right to read it
                same = False
            if same:
                files[name] = [held, *now]
            else:
                wrong.append(f"{name} differs")
            progress.add(1)
    if wrong:
        raise UserError(f"{target} is not what its archive held: {listed(wrong, 3)}; {CHECK}")
    if changed:
        with suppress(OSError):  # a folder that cannot be written to costs time, no more
            _remember(target, digest, files)


def _remember(folder: Path, digest: str, files: dict[str, list]) -> None:
    atomic_write(folder / MANIFEST, json.dumps({"archive": digest, "files": files}))


def _files(folder: Path) -> dict[str, os.stat_result]:
    """Relative path -> status of all that lies below `folder` and is no folder; links are not followed."""
    found, left = {}, [("", folder)]
    while left:
        prefix, inner = left.pop()
        with os.scandir(inner) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append((f"{prefix}{entry.name}/", Path(entry.path)))
                elif prefix or entry.name != MANIFEST:
                    found[prefix + entry.name] = entry.stat(follow_symlinks=False)
    return found


@dataclass(frozen=True)
class _Member:
    name: str  # as stated
    path: str  # with forward slashes
    bytes: int
    plain: bool  # a file or a folder
    folder: bool
    open: Callable[[], IO[bytes] | None]


def _read(archive: Path, folder: Path | None) -> dict[str, str]:
    """Relative path -> SHA-256 of each file in an archive, written below `folder` if there is one.

    Raises UserError, OSError.
    """
    damaged = f"{archive} cannot be unpacked (%s); it may be damaged: fetch it anew"
    try:
        with open_regular(archive) as stream:
            return _read_members(archive, stream, folder)
    except (UserError, NotRegular):
        raise
    except OSError as error:
        if error.errno is None:  # raised by a decoder, such as gzip's
            raise UserError(damaged % one_line(error)) from error
        raise
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        raise UserError(damaged % one_line(error)) from error


def _read_members(archive: Path, stream: BinaryIO, folder: Path | None) -> dict[str, str]:
    packed, unpacked, held = os.fstat(stream.fileno()).st_size, 0, {}
    free = shutil.disk_usage(folder).free if folder else None
    for member in _members(archive, stream):
        if not member.plain:
            raise UserError(
                f"{archive} is refused: {member.name!r} is a link or a device, not a file; nothing was kept"
            )
        # both kinds of path, as tools on Windows write backslashes and drives
        for path in (PurePosixPath(member.name), PureWindowsPath(member.name)):
            if path.is_absolute() or path.drive or ".." in path.parts:
                raise UserError(
                    f"{archive} is refused: {member.name!r} points outside of the archive; nothing was kept"
                )
        unpacked += max(member.bytes, BLOCK)
        if free is not None and unpacked > free:
            raise UserError(f"{archive} does not fit: it needs more than the {size(free)} free in {folder.parent}")
        if unpacked > max(BLOWN_UP * packed, LARGE):
            raise UserError(
                f"{archive} is refused: its {size(packed)} unpack to over {size(unpacked)} in {len(held) + 1} files"
            )
        name = PurePosixPath(member.path).as_posix()
        if member.folder:
            if folder:
                (folder / name).mkdir(parents=True, exist_ok=True)
        elif name in (".", MANIFEST):
            raise UserError(f"{archive} is refused: a file in it is called {member.name!r}; nothing was kept")
        else:
            held[name] = _copy(member, folder / name if folder else None)
    return held


def _copy(member: _Member, path: Path | None) -> str:
    """Writes a member to a file, if one is given, and returns its SHA-256."""
    digest, left = hashlib.sha256(), member.bytes
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(path or os.devnull, "wb") as sink:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            sink.write(chunk)
    if left:
        raise tarfile.ReadError(f"{printable(member.name)} is not as long as stated")
    return digest.hexdigest()


def _members(archive: Path, stream: BinaryIO) -> Iterator[_Member]:
    if archive.name.lower().endswith(".zip"):  # not is_zipfile(): it also finds a zip at the end of a tar
        with zipfile.ZipFile(stream) as packed:
            for member in packed.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if made on Windows
                plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
                path = member.filename.replace("\\", "/")  # old tools on Windows write those
                yield _Member(
                    member.filename, path, member.file_size, plain, path.endswith("/"), lambda m=member: packed.open(m)
                )
    else:
        with closing(tarfile.open(fileobj=stream, tarinfo=_Header)) as packed:
            while (member := packed.next()) is not None:
                packed.members.clear()  # a kilobyte each
                plain = member.isreg() or member.isdir()
                yield _Member(
                    member.name, member.name, member.size, plain, member.isdir(), lambda m=member: packed.extractfile(m)
                )


class _Header(tarfile.TarInfo):
    """A header of a tar that is not believed: tarfile reads what it announces into memory, and ends quietly at a
    damaged one.
    """

    @classmethod
    def fromtarfile(cls, tarfile_):
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, tarfile.SubsequentHeaderError):
            raise
        except tarfile.EmptyHeaderError:
            if tarfile_.offset:
                raise tarfile.ReadError("cut short: the mark at its end is missing") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tarfile_):
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        if self.type in READ_AT_ONCE and self.size > HEADER:
            raise tarfile.ReadError(f"a name or a header of {size(self.size)}, more than {size(HEADER)}")
        return super()._proc_member(tarfile_)

    def _block(self, count):
        if count < 0:  # Python before 3.11.14 goes back in the file, for ever
            raise tarfile.ReadError("a member of negative size")
        return super()._block(count)

    def _refuse_sparse(self, *_):
        raise tarfile.ReadError("a sparse file, which images are not")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse
