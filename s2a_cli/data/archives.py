"""Extracts archives that may be damaged or hostile: plain files below the target folder, or nothing.

Each extracted folder holds a manifest of what its archive held, and is compared with it whenever it is used.
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
from typing import IO, Any, BinaryIO, cast

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import NotRegular, atomic_write, lock, open_regular, sha256, stamp
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import listed, one_line, printable, size

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
# An archive is refused whose files take more than LARGEST_RATIO times its own size and more than LARGE bytes.
LARGEST_RATIO, LARGE = 200, 10**9  # images do not pack that well
BLOCK = 4096  # bytes that the smallest file takes on a disk
HEADER = 16 << 10  # bytes of a long name or of extended attributes in a tar, which are read at once; paths end at 4096
READ_AT_ONCE = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
CHUNK = 1 << 20
# In the folder: {"archive": SHA-256, "files": {name: [SHA-256, size, mtime, ctime, inode]}}
MANIFEST = ".s2a-extracted.json"
CHECK = "remove that folder to have it extracted anew"


def extract(archive: Path, target: Path, digest: str | None = None) -> None:
    """Extracts a tar or zip, whose SHA-256 is `digest`, to the new folder `target`, which appears when it is complete.

    Raises UserError where the archive is damaged, does not fit on the disk, or holds anything but files and folders
    below `target`: absolute paths, "..", links, devices.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        held = _read(archive, partial)
        files = {name: [held[name], *stamp(status)] for name, status in _files(partial).items()}
        _write_manifest(partial, digest or sha256(archive), files)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"cannot extract {archive} to {target} ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract_once(archive: Path, target: Path, digest: str | None = None) -> None:
    """Extracts `archive` to `target` unless that folder is there already. Two processes take turns.

    Raises UserError as `extract` does, and where the folder is no longer what the archive held.
    """
    digest = digest or sha256(archive)
    if not target.exists():
        with lock(target.parent, target.name):
            if not target.exists():
                return extract(archive, target, digest)
    if not is_extracted(target, digest):
        # extracted before there were manifests, or the manifest was lost
        files = {name: [held, -1, 0, 0, 0] for name, held in _read(archive, None).items()}
        _compare(target, digest, files)


def is_extracted(target: Path, digest: str) -> bool:
    """Tells whether the manifest of `target` says that it was extracted from the archive of this SHA-256.

    Raises UserError where it was and files have changed, are missing or were added. Reads only files whose size, times
    or inode have changed.
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
    """Compares a folder with `files`, and writes the manifest anew where sizes, times or inodes have changed.

    files: name -> [SHA-256, size, mtime, ctime, inode]; a size of -1 is not known. Raises UserError where they differ.
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
            _write_manifest(target, digest, files)


def _write_manifest(folder: Path, digest: str, files: dict[str, list]) -> None:
    atomic_write(folder / MANIFEST, json.dumps({"archive": digest, "files": files}))


def _files(folder: Path) -> dict[str, os.stat_result]:
    """Returns relative path -> status of all that lies below `folder` and is no folder; links are not followed."""
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
    """A member of an archive, in the terms of neither format."""

    name: str  # as the archive has it
    path: str  # with forward slashes
    bytes: int
    plain: bool  # a file or a folder
    folder: bool
    open: Callable[[], IO[bytes]]


def _read(archive: Path, folder: Path | None) -> dict[str, str]:
    """Returns relative path -> SHA-256 of each file in an archive, and writes them below `folder` if one is given.

    Raises UserError for an archive that is damaged or refused, OSError where a disk fails.
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
    free = shutil.disk_usage(folder).free if folder else 0
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
        if folder and unpacked > free:
            raise UserError(f"{archive} does not fit: it needs more than the {size(free)} free in {folder.parent}")
        if unpacked > max(LARGEST_RATIO * packed, LARGE):
            raise UserError(
                f"{archive} is refused: its {size(packed)} unpack to over {size(unpacked)} in {len(held) + 1} files"
            )
        name = PurePosixPath(member.path).as_posix()
        if member.folder:
            if folder:
                (folder / name).mkdir(parents=True, exist_ok=True)
        elif name in (".", MANIFEST):
            raise UserError(f"{archive} is refused: a file in it is called {member.name!r}; nothing was kept")
        elif name in held:
            raise UserError(f"{archive} is refused: it holds {member.name!r} more than once; nothing was kept")
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
    """Yields the members of a tar or zip as they stand there, unchecked."""
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
                packed.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # they take a kilobyte each
                plain = member.isreg() or member.isdir()

                def content(member: tarfile.TarInfo = member) -> IO[bytes]:
                    return cast(IO[bytes], packed.extractfile(member))  # None is for links alone, which are refused

                yield _Member(member.name, member.name, member.size, plain, member.isdir(), content)


TARFILE: Any = tarfile  # with names that type checkers do not know
EMPTY_HEADER, EOF_HEADER = TARFILE.EmptyHeaderError, TARFILE.EOFHeaderError
SUBSEQUENT_HEADER = TARFILE.SubsequentHeaderError


class _Header(tarfile.TarInfo):
    """A header of a tar that is checked first.

    tarfile itself would read into memory whatever a header announces, and end without an error at a damaged one.
    """

    @classmethod
    def fromtarfile(cls, tarfile_):
        try:
            return super().fromtarfile(tarfile_)
        except (EOF_HEADER, SUBSEQUENT_HEADER):
            raise
        except EMPTY_HEADER:
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
        return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]

    def _block(self, count):
        if count < 0:  # Python before 3.11.14 goes back in the file, for ever
            raise tarfile.ReadError("a member of negative size")
        return super()._block(count)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_sparse(self, *_):
        raise tarfile.ReadError("a sparse file, which images are not")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse
