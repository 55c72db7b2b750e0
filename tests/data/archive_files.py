"""Writes archives for the tests: good ones, and ones with names or members that are refused."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile


def add_file(archive: tarfile.TarFile, name: str, content: bytes = b"content", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content) if member.isreg() else 0
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def make_tar(path, *names, **fields):
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        add_file(archive, "good.txt")
        for name in names:
            add_file(archive, name, **fields)
    return path


def make_zip(path, *names, mode=stat.S_IFREG | 0o644):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.txt", "content")
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "content")
    return path
