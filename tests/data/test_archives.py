"""Archives: extracted once and whole, or refused with nothing left behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import stat
import tarfile

import pytest
from archive_files import add_file, make_tar, make_zip
from fake_web import remote
from refusals import refusal

from s2a_cli.data import archives
from s2a_cli.data.archives import HEADER, MANIFEST, extract, extract_once
from s2a_cli.data.download import fetch, fetch_tree


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_good_archive_is_extracted_once(tmp_path, name):
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name, "folder/inner/file.txt")
    extract_once(archive, tmp_path / "target")
    assert (tmp_path / "target/folder/inner/file.txt").read_bytes() == b"content"
    inode = (tmp_path / "target/good.txt").stat().st_ino
    extract_once(archive, tmp_path / "target")
    assert (tmp_path / "target/good.txt").stat().st_ino == inode
    assert (
        json.loads((tmp_path / "target" / MANIFEST).read_text())["archive"]
        == hashlib.sha256(archive.read_bytes()).hexdigest()
    )


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    content = make_zip(tmp_path / "inner.zip").read_bytes()
    archive = make_tar(tmp_path / "a.tar", "inner.zip", content=content)
    extract(archive, tmp_path / "target")
    assert (tmp_path / "target/inner.zip").read_bytes() == content


HOSTILE = ["../outside.txt", "folder/../../outside.txt", "/tmp/outside.txt", "..\\outside.txt", "C:\\outside.txt"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("make", "kind"), [(make_tar, "tar"), (make_zip, "zip")])
def test_paths_that_lead_outside_are_refused(tmp_path, make, kind, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    archive = make(inside / f"a.{kind}", name)
    message = refusal(extract, archive, inside / "target")
    assert repr(name) in message and "outside" in message
    assert sorted(p.name for p in tmp_path.rglob("*")) == [f"a.{kind}", "inside"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    archive = make_tar(tmp_path / "a.tar", "trap", type=kind, linkname="/etc/passwd")
    assert "'trap' is a link or a device" in refusal(extract, archive, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_links_in_a_zip_are_refused(tmp_path):
    archive = make_zip(tmp_path / "a.zip", "trap", mode=stat.S_IFLNK | 0o777)
    assert "'trap' is a link or a device" in refusal(extract, archive, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar.gz", "big", content=bytes(10**6))
    extract(archive, tmp_path / "fits")
    monkeypatch.setattr("s2a_cli.data.archives.LARGE", 10**5)
    assert "unpack to over" in refusal(extract, archive, tmp_path / "target")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "does not fit" in refusal(extract, archive, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "not an archive"])
def test_a_damaged_archive_leaves_nothing(tmp_path, name, damage):
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name, "one.txt", "two.txt")
    content = archive.read_bytes()
    archive.write_bytes(
        {
            "truncated": content[: 1600 if name == "a.tar" else len(content) - 30],
            "overwritten": b"\xff" * 40 + content[40:60] + b"\xff" * 200,
            "empty": b"",
            "not an archive": b"<html>moved</html>" * 50,
        }[damage]
    )
    message = refusal(extract, archive, tmp_path / "target")
    assert str(archive) in message and "damaged" in message
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("change", ["as long, as old", "longer", "missing", "added", "a link", "a pipe"])
def test_a_folder_that_is_not_what_its_archive_held_is_refused(web, tmp_path, change):
    archive = make_tar(tmp_path / "photos.tar", "folder/photo.jpg")
    file = remote("http://127.0.0.1:9", "/a", content=archive.read_bytes(), name="photos.tar")
    tree = fetch_tree(file, tmp_path)
    archive.unlink()
    assert fetch_tree(file, tmp_path, download=False) == tree, "the archive is not needed any more"
    photo = tree / "folder/photo.jpg"
    before = photo.stat()
    if change == "added":
        (tree / "folder" / ".DS_Store").write_text("what a Mac leaves")
        fetch_tree(file, tmp_path, download=False)
        (tree / "folder" / "noise.jpg").write_bytes(b"noise")
    else:
        photo.unlink()
    if change in ("as long, as old", "longer"):
        photo.write_bytes(b"CONTENT" if change == "as long, as old" else b"content and more")
        os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "a link":
        (tmp_path / "elsewhere").write_bytes(b"content")
        photo.symlink_to("/dev/zero")
    elif change == "a pipe":
        os.mkfifo(photo)
    message = refusal(fetch_tree, file, tmp_path, download=False)
    said = {"added": "folder/noise.jpg was added", "missing": "folder/photo.jpg is missing"}.get(
        change, "folder/photo.jpg differs"
    )
    assert said in message and str(tree) in message and "remove that folder" in message


def test_a_folder_that_was_copied_is_read_again_once(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "photos.tar", "folder/photo.jpg")
    extract_once(archive, tmp_path / "tree")
    shutil.copytree(tmp_path / "tree", tmp_path / "copy")
    read = []
    monkeypatch.setattr(
        archives, "sha256", lambda path: read.append(path.name) or hashlib.sha256(path.read_bytes()).hexdigest()
    )
    for _ in range(2):
        extract_once(archive, tmp_path / "copy", hashlib.sha256(archive.read_bytes()).hexdigest())
        assert sorted(read) == ["good.txt", "photo.jpg"]


@pytest.mark.parametrize(
    "manifest", [None, "{", "[]", '{"archive": 1}', '{"archive": "%s", "files": {"good.txt": [1]}}', "[" * 10**5]
)
def test_a_folder_from_before_is_compared_with_its_archive(tmp_path, manifest):
    archive = make_tar(tmp_path / "photos.tar")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    extract_once(archive, tmp_path / "tree")
    for good in (True, False):
        (tmp_path / "tree" / MANIFEST).unlink()
        if manifest:
            (tmp_path / "tree" / MANIFEST).write_text(manifest.replace("%s", digest))
        if good:
            extract_once(archive, tmp_path / "tree")
            assert "good.txt" in json.loads((tmp_path / "tree" / MANIFEST).read_text())["files"]
        else:
            (tmp_path / "tree/good.txt").write_text("another")
            assert "good.txt differs" in refusal(extract_once, archive, tmp_path / "tree")


def long_name(size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return member


def test_a_name_of_many_megabytes_is_refused_before_it_is_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        add_file(archive, "good.txt")
        archive.addfile(long_name(64 << 20), Zeros(64 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "a name or a header of 67.1 MB" in refusal(extract, tmp_path / "a.tar.gz", tmp_path / "target")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


class Zeros(io.RawIOBase):
    def __init__(self, left: int):
        self.left = left

    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


def test_names_as_long_as_a_path_can_be_are_read(tmp_path):
    name = "/".join(["x" * 200] * 8) + "/good.jpg"
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{format_}.tar", "w", format=format_) as archive:
            add_file(archive, name)
        extract(tmp_path / f"{format_}.tar", tmp_path / str(format_))
        assert (tmp_path / str(format_) / name).read_bytes() == b"content"
    assert HEADER > 4096


def test_an_archive_of_very_many_files_is_refused(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar.gz", *map(str, range(300)), content=b"")
    monkeypatch.setattr(archives, "LARGE", 10**6)
    assert "in 245 files" in refusal(extract, archive, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize(
    "member", [{"type": tarfile.GNUTYPE_SPARSE}, {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}}]
)
def test_sparse_files_are_refused(tmp_path, member):
    assert "sparse" in refusal(extract, make_tar(tmp_path / "a.tar", "hole.jpg", **member), tmp_path / "target")


def test_a_negative_size_ends_nothing_in_a_loop(tmp_path):
    content = bytearray(make_tar(tmp_path / "a.tar", "back.jpg").read_bytes())
    header = content[1024:1536]
    header[124:136] = b"\xff" * 10 + (-2048 & 0xFFFF).to_bytes(2, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    (tmp_path / "a.tar").write_bytes(content)
    assert "negative size" in refusal(extract, tmp_path / "a.tar", tmp_path / "target")


@pytest.mark.parametrize("where", ["a header", "between two members"])
def test_a_tar_that_breaks_off_or_is_damaged_midway_is_not_taken_for_whole(tmp_path, where):
    content = bytearray(make_tar(tmp_path / "a.tar", "one.txt", "two.txt").read_bytes())
    if where == "a header":
        content[2048 + 10] ^= 1
    else:
        del content[2048:]
    (tmp_path / "a.tar").write_bytes(content)
    assert "damaged" in refusal(extract, tmp_path / "a.tar", tmp_path / "target")


def test_names_in_a_zip(tmp_path):
    archive = make_zip(tmp_path / "a.zip", "photos\\cat\\0.jpg", "caf\u00e9.jpg")
    extract(archive, tmp_path / "target")
    assert (tmp_path / "target/photos/cat/0.jpg").read_bytes() == b"content", "as old tools on Windows write it"
    archive.write_bytes(archive.read_bytes().replace("caf\u00e9".encode(), b"caf\xff\xfe"))
    assert "cannot be unpacked" in refusal(extract, archive, tmp_path / "undecodable")


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_what_is_no_file_is_no_archive(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link.{name}").symlink_to("/dev/zero")
    assert "a pipe, not a file" in refusal(extract, tmp_path / name, tmp_path / "target", "")
    assert "a device, not a file" in refusal(extract, tmp_path / f"link.{name}", tmp_path / "target", "")
    os.mkfifo(tmp_path / "data.bin")
    assert "a pipe, not a file" in refusal(fetch, remote("http://127.0.0.1:9", "/a"), tmp_path)
    (tmp_path / "data.bin").rename(tmp_path / "data.bin.part")
    assert "is not a file" in refusal(fetch, remote("http://127.0.0.1:9", "/a"), tmp_path)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial/old").write_text("half")
    extract(make_tar(tmp_path / "a.tar"), tmp_path / "target")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [MANIFEST, "a.tar", "good.txt", "target"]


@pytest.mark.parametrize("name", ["twice.tar", "twice.zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path, name):
    make = make_tar if name.endswith(".tar") else make_zip
    archive = make(tmp_path / name, "cat/1.jpg", "dog/1.jpg", "cat/1.jpg")
    assert "holds 'cat/1.jpg' more than once" in refusal(extract, archive, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == [name]
