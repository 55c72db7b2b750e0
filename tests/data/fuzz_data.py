"""Draws image files, archives and folders as strangers send them, and checks what must hold for each.

Some are valid, some damaged, some made to harm. test_fuzz_data.py draws a few, `python scripts/fuzz.py 20000 images
archives folders` as many as wanted.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import stat
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import folder_config
from PIL import Image

from s2a_cli.common.errors import UserError
from s2a_cli.data import archives, describe, load
from s2a_cli.data.images import open_rgb

SECONDS = 10  # a hang

ENDINGS = (".jpg", ".png", ".gif", ".bmp", ".tif", ".ppm", ".webp", ".avif", ".JPEG", ".heic", ".txt", "")
WRITTEN = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "EPS", "PCX", "ICO", "SGI", "PDF")
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")


@cache
def image_bytes(format_: str, mode: str, width: int, height: int, fill: int) -> bytes:
    """Returns a file with an image in the nearest mode that the format takes; empty where Pillow can't write it."""
    values = np.random.default_rng(fill).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    for wanted in (mode, "RGB", "L"):
        buffer = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.convert(wanted).save(buffer, format_)
            return buffer.getvalue()
        except Exception:  # each plugin has its own ways to say no
            continue
    return b""


SPOTS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


@dataclass(frozen=True)
class Damage:
    """Damages bytes: overwrites spots, and replaces the end."""

    spots: list[tuple[float, bytes]] = field(default_factory=list)  # (share of the length, what is written there)
    keeps: float = 1.0  # share of the length that is kept
    tail: bytes = b""  # what follows

    def of(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for at, bytes_ in self.spots:
            start = int(at * len(changed))
            changed[start : start + len(bytes_)] = bytes_
        return bytes(changed[: int(self.keeps * len(changed))]) + self.tail


real_damages = st.builds(Damage, SPOTS, st.just(1.0) | st.floats(0, 1), st.just(b"") | st.binary(max_size=16))
damages = st.just(Damage()) | st.just(Damage()) | real_damages
sides = st.integers(1, 40)
images = st.builds(
    lambda content, damage: damage.of(content),
    st.builds(image_bytes, st.sampled_from(WRITTEN), st.sampled_from(MODES), sides, sides, st.integers(0, 3))
    | st.binary(max_size=64),
    damages,
)

# Names without a slash that a disk takes, and worse ones for archives
plain_names = st.sampled_from(
    ["cat", "dog", "train", "test", "Val", "validation", "training_set", ".hidden", "0", "a b", "é", "__MACOSX"]
)
odd_names = st.sampled_from(["\n", "\x1b[2J", "\udcff", "$(x)", "-rf", "CON", "a" * 255, "x.tar"]) | st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6
).filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) < 250)
names = plain_names | plain_names | odd_names
files = st.builds(
    lambda stem, ending: stem + ending, plain_names | odd_names.filter(lambda n: len(n) < 200), st.sampled_from(ENDINGS)
)


@dataclass(frozen=True)
class Tree:
    """A folder as pairs of a path and what lies there: bytes, "pipe", or ("link", target)."""

    entries: list[tuple[tuple[str, ...], object]]

    def write(self, root: Path) -> None:
        """Writes what can be, so no file below a file, and nothing through a link."""
        root.mkdir(parents=True, exist_ok=True)
        for parts, content in self.entries:
            path = root.joinpath(*parts)
            try:
                if os.path.lexists(path) or os.path.realpath(path.parent) != str(path.parent):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if content == "pipe":
                    os.mkfifo(path)
                elif isinstance(content, tuple):
                    path.symlink_to(content[1])
                else:
                    path.write_bytes(content)
            except OSError:
                continue


good_images = st.builds(image_bytes, st.sampled_from(WRITTEN[:6]), st.just("RGB"), sides, sides, st.integers(0, 9))
targets = [".", "..", "../..", "/", "/dev/zero", "nowhere", "../cat", "../dog/0.png", "../../test", "loop.png"]
links = st.tuples(st.just("link"), st.sampled_from(targets))
contents = good_images | good_images | images | links | st.just("pipe")
paths = (
    st.tuples(names, files) | st.tuples(names, names, files) | st.tuples(files) | st.tuples(names, names, names, files)
)
class_paths = st.sampled_from(["cat", "dog", "train/cat", "train/dog", "test/cat", "test/dog"])
usual = st.tuples(class_paths, files).map(lambda drawn: (*drawn[0].split("/"), drawn[1]))
entries = st.lists(st.tuples(usual | paths, contents), max_size=8)


def class_images(tops: tuple[str, ...]) -> st.SearchStrategy[list]:
    """Draws enough good images in two classes of each tree."""
    wanted = [
        (*filter(None, top.split("/")), name, f"{number}.png")
        for top in tops
        for name in ("cat", "dog")
        for number in range(4)
    ]
    return st.lists(good_images, min_size=len(wanted), max_size=len(wanted)).map(
        lambda contents: list(zip(wanted, contents))
    )


good_entries = st.sampled_from(
    [("",), ("train", "test"), ("Training", "TEST", "val"), ("training_set", "test_set")]
).flatmap(class_images)
trees = st.builds(lambda good, more: Tree(more + good), st.just([]) | good_entries | good_entries, entries)


@dataclass(frozen=True)
class Member:
    name: str
    content: bytes
    kind: bytes = tarfile.REGTYPE
    stated: int | None = None  # bytes that the header states
    link: str = ""


def tar_bytes(members: list[Member], mode: str, format_: int) -> bytes:
    buffer = io.BytesIO()
    try:
        with tarfile.open(fileobj=buffer, mode=mode, format=format_) as archive:
            for member in members:
                info = tarfile.TarInfo(member.name)
                info.type, info.linkname = member.kind, member.link
                info.size = len(member.content)
                archive.addfile(info, io.BytesIO(member.content))
    except (ValueError, UnicodeError):  # a name that the format has no room for
        pass
    return restate(buffer.getvalue(), members) if mode == "w" else buffer.getvalue()


def restate(content: bytes, members: list[Member]) -> bytes:
    """Returns a tar in which members state other sizes, which may be negative, under a valid checksum."""
    stated = [member.stated for member in members]
    changed, at = bytearray(content), 0
    for value in stated:
        if at + 512 > len(changed) or not changed[at]:
            break
        size = int(bytes(changed[at + 124 : at + 135]) or b"0", 8) if changed[at + 124] < 128 else 0
        if value is not None:
            changed[at + 124 : at + 136] = (value & (2**96 - 1)).to_bytes(12, "big")
            changed[at + 124] |= 128
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
        at += 512 + -(-size // 512) * 512
    return bytes(changed)


def zip_bytes(members: list[Member], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for member in members:
            info = zipfile.ZipInfo(member.name.encode("utf-8", "replace").decode())
            info.compress_type = method
            info.external_attr = (stat.S_IFLNK if member.kind == tarfile.SYMTYPE else stat.S_IFREG) << 16
            archive.writestr(info, member.content)
    return buffer.getvalue()


def with_flag(content: bytes, name: bytes) -> bytes:
    """Returns a zip in which the names are not UTF-8, as their flag says."""
    return content.replace("é".encode(), name)


archive_names = st.builds("/".join, usual | st.tuples(names, names, files)) | st.sampled_from(
    [
        *("../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "a/../../out.txt", "cat", "cat/x/y"),
        *("", ".", "./", archives.MANIFEST, "x" * 300, "é"),
    ]
)
odd_kinds = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE,
    tarfile.XHDTYPE,
    b"?",
]
kinds = st.sampled_from([tarfile.REGTYPE] * 12 + odd_kinds)
members = st.builds(
    Member, archive_names, good_images | images | st.just(bytes(5000)), kinds,
    st.sampled_from([None] * 12 + [-1, -512, -(2**60), 2**70, 10**9, 3]), st.sampled_from(["/etc/passwd", "cat/0.png"]),
)  # fmt: skip
good_members = good_entries.map(lambda entries: [Member("/".join(parts), content) for parts, content in entries])
all_members = st.builds(list.__add__, st.just([]) | good_members, st.just([]) | st.lists(members, max_size=4))
tars = st.tuples(
    st.sampled_from([(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")]),
    all_members, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]), damages,
).map(lambda drawn: (drawn[0][0], drawn[3].of(tar_bytes(drawn[1], drawn[0][1], drawn[2]))))  # fmt: skip
zips = st.tuples(
    all_members, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
    st.sampled_from(["é".encode(), b"\xff\xfe"]), damages,
).map(lambda drawn: (".zip", drawn[3].of(with_flag(zip_bytes(drawn[0], drawn[1]), drawn[2]))))  # fmt: skip
packed = tars | zips  # (ending, bytes)


@contextlib.contextmanager
def sandbox() -> Iterator[Path]:
    """Yields a new folder. Raises AssertionError for what takes longer than SECONDS or changes anything beside it."""

    def too_long(*_):
        raise AssertionError(f"longer than {SECONDS} s")

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large or odd files
        folder = Path(name).resolve()
        (folder / "inside").mkdir()
        (folder / "witness.txt").write_text("as it was")
        before, environment = signal.signal(signal.SIGALRM, too_long), os.environ.get("S2A_DATA")
        os.environ["S2A_DATA"] = str(folder / "inside" / "cache")
        signal.alarm(SECONDS)
        try:
            yield folder / "inside"
            assert sorted(path.name for path in folder.iterdir()) == ["inside", "witness.txt"]
            assert (folder / "witness.txt").read_text() == "as it was"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            os.environ.pop("S2A_DATA") if environment is None else os.environ.update(S2A_DATA=environment)


def one_line(error: UserError) -> None:
    """Checks that a refusal can be printed anywhere, and is not Python's own text."""
    said = str(error)
    assert said and "\n" not in said and "\x1b" not in said and "Traceback" not in said
    said.encode()


def check_loads(root: Path, **chosen) -> None:
    for _ in range(2):  # the second time from what is kept
        try:
            splits = load(folder_config(root, **chosen))
        except UserError as error:
            one_line(error)
            continue
        describe(splits).encode()
        assert "\x1b" not in describe(splits)
        counts = splits.counts()
        assert len(splits.classes) >= 2 and counts.sum() == len(splits.train) + len(splits.val) + len(splits.test)
        for split in (splits.train, splits.val, splits.test):
            for index in range(len(split)):
                image, label = split[index]
                assert image.mode == "RGB" and min(image.size) > 0
                parts = (
                    Path(split.name(index)).relative_to(root).parts
                    if Path(split.name(index)).is_relative_to(root)
                    else ()
                )
                assert not parts or splits.classes[label] in parts[:2], (
                    "an image has the label of the folder that it lies in"
                )


def check_image(content: bytes, ending: str) -> None:
    with sandbox() as folder:
        path = folder / f"image{ending}"
        path.write_bytes(content)
        try:
            image = open_rgb(path)
        except (AssertionError, MemoryError):
            raise
        except Exception:  # on damaged bytes decoders raise nearly anything; who calls says which file it was
            return
        assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8


def check_archive(archive: tuple[str, bytes]) -> None:
    ending, content = archive
    with sandbox() as folder:
        path = folder / f"photos{ending}"
        path.write_bytes(content)
        try:
            archives.extract(path, folder / "target")
        except UserError as error:
            one_line(error)
            assert sorted(entry.name for entry in folder.iterdir()) == [path.name], "nothing is half there"
        else:
            assert archives.is_extracted(folder / "target", archives.sha256(path))
            for entry in (folder / "target").rglob("*"):
                assert not entry.is_symlink() and (entry.is_file() or entry.is_dir())
            shutil.rmtree(folder / "target")
        check_loads(path, on_corrupt="skip")


def check_folder(tree: Tree, layout: str | None, on_corrupt: str) -> None:
    with sandbox() as folder:
        tree.write(folder / "photos")
        check_loads(folder / "photos", layout=layout, on_corrupt=on_corrupt)


DRAWN: dict[Callable, dict[str, st.SearchStrategy]] = {
    check_image: {"content": images, "ending": st.sampled_from(ENDINGS)},
    check_archive: {"archive": packed},
    check_folder: {
        "tree": trees,
        "layout": st.sampled_from([None, None, "splits", "classes"]),
        "on_corrupt": st.sampled_from(["stop", "skip"]),
    },
}


def fuzz(check: Callable, examples: int, same: bool = False) -> None:
    """Tries a check with drawn examples, and raises what the smallest failing one raises.

    same: draw the same examples each time.
    """
    how = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=same
    )
    how(given(**DRAWN[check])(check))()
