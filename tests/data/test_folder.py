"""Folders of the user's images: trees of classes, splits and archives of them."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import folder_config, save, tree
from refusals import folder_refusal

from s2a_cli.data import load, photos, title


def names(split) -> set[str]:
    return {split.name(index) for index in range(len(split))}


def test_one_tree_is_split_by_class(tmp_path):
    root = tree(tmp_path / "photos", images=10)
    splits = load(folder_config(root))
    assert splits.name == "photos" and splits.classes == ["cat", "dog"]
    assert [np.bincount(s.labels).tolist() for s in (splits.train, splits.val, splits.test)] == [[6, 6], [2, 2], [2, 2]]
    everything = [names(s) for s in (splits.train, splits.val, splits.test)]
    assert len(set.union(*everything)) == 20
    again, other = load(folder_config(root)), load(folder_config(root, split_seed=1))
    assert names(again.test) == names(splits.test) and names(other.test) != names(splits.test)
    assert other.revision == splits.revision
    image, label = splits.test[0]
    assert Path(splits.test.name(0)).parent.name == splits.classes[label] and image.size == (12, 10)


def test_every_folder_has_a_name_that_can_be_written(tmp_path):
    """A record without one can't be read again."""
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    latin.mkdir()
    (tmp_path / "link").symlink_to(latin)
    named = {".photos": "photos", "my.photos": "my", "...": "folder", "link": "caf\\udce9"}
    assert {name: title(folder_config(tmp_path / name)) for name in named} == named
    assert title(folder_config(Path("/"))) == "folder"


@pytest.mark.parametrize("val", [None, "val", "valid", "validation"])
def test_split_trees(tmp_path, val):
    for seed, (name, count) in enumerate([("train", 5), ("test", 3), (val, 2)]):
        if name:
            tree(tmp_path / name, images=count, seed=1000 * seed)
    splits = load(folder_config(tmp_path))
    assert (len(splits.train), len(splits.val), len(splits.test)) == ((10, 4, 6) if val else (8, 2, 6))
    assert all(f"/{val or 'train'}/" in name for name in names(splits.val))


def test_nested_hidden_and_other_files(tmp_path):
    root = tree(tmp_path / "photos", images=3)
    save(root / "cat" / "2019" / "july" / "deep.JPG", 50)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._0.png").write_bytes(b"what a Mac leaves")
    save(root / "cat" / ".thumbnails" / "0.png", 51)
    save(root / ".git" / "0.png", 52)
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    splits = load(folder_config(root))
    found = set.union(*(names(s) for s in (splits.train, splits.val, splits.test)))
    assert splits.classes == ["cat", "dog"] and len(found) == 7
    assert str(root / "cat/2019/july/deep.JPG") in found


def test_folders_that_do_not_fit_are_refused(tmp_path):
    assert "does not exist" in folder_refusal(tmp_path / "nowhere")
    assert "does not exist" in folder_refusal(tmp_path / "no\nwhere")
    assert "names of at most 255 bytes" in folder_refusal(tmp_path / ("x" * 5000))
    (tmp_path / "file.txt").write_text("")
    assert "neither a folder nor an archive" in folder_refusal(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in folder_refusal(tmp_path / "empty")
    root = tree(tmp_path / "photos")
    (root / "bird").mkdir()
    (root / "bird" / "readme.md").write_text("no image yet")
    assert f"no image in {root / 'bird'}" in folder_refusal(root)
    save(tmp_path / "latin" / os.fsdecode(b"caf\xe9") / "0.png", 0)
    assert "latin/caf\\udce9: the name of this class is no text in UTF-8" in folder_refusal(tmp_path / "latin")
    assert "one class folder, 'cat'" in folder_refusal(tree(tmp_path / "single", classes=["cat"]))
    assert "no class has the two images" in folder_refusal(tree(tmp_path / "scarce", images=1))


def test_split_trees_that_do_not_agree_are_refused(tmp_path):
    tree(tmp_path / "train")
    message = folder_refusal(tmp_path)
    assert "has train but no test" in message and "dataset.layout=classes" in message
    tree(tmp_path / "test", classes=["cat", "bird", "cow"])
    assert f"{tmp_path / 'test'} has classes that train does not have: bird, cow" in folder_refusal(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert "has test but no train" in folder_refusal(tmp_path)


def test_an_archive_is_extracted_once(tmp_path, cache):
    tree(tmp_path / "photos" / "train", suffix=".jpg")
    tree(tmp_path / "photos" / "test", suffix=".jpg", images=2)
    plain = load(folder_config(tmp_path / "photos"))
    with tarfile.open(tmp_path / "flat.tar.gz", "w:gz") as archive:
        for name in ("train", "test"):
            archive.add(tmp_path / "photos" / name, arcname=name)
    wrapped = Path(shutil.make_archive(str(tmp_path / "wrapped"), "zip", tmp_path, "photos"))
    for archive in (tmp_path / "flat.tar.gz", wrapped):
        splits = load(folder_config(archive))
        assert splits.name == archive.name.split(".")[0]
        assert (splits.classes, splits.revision) == (plain.classes, plain.revision)
        assert names(splits.train).isdisjoint(names(plain.train)) and len(splits.test) == 4
    extracted = sorted(path.name for path in (cache / "folder").iterdir() if path.is_dir())
    assert [name.rsplit("-", 1)[0] for name in extracted] == ["checked", "flat", "wrapped"]
    long = wrapped.rename(tmp_path / f"{'n' * 240}.zip")
    assert load(folder_config(long)).revision == plain.revision
    (tmp_path / "photos" / "train" / "cat" / "0.jpg").write_bytes(b"")
    damaged = shutil.make_archive(str(tmp_path / "damaged"), "tar", tmp_path, "photos")
    assert "make its archive anew without it, or leave such images out" in folder_refusal(Path(damaged))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    assert "damaged" in folder_refusal(tmp_path / "bad.tar")


def test_revision_is_of_the_content(tmp_path):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "elsewhere" / "two")
    revision = load(folder_config(one)).revision
    assert load(folder_config(two)).revision == revision
    os.utime(two / "cat" / "0.png", (1, 1))
    assert load(folder_config(two)).revision == revision
    (two / "cat" / "0.png").rename(two / "cat" / "zero.png")
    renamed = load(folder_config(two)).revision
    assert renamed != revision
    path = two / "dog" / "0.png"
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 1  # in the checksum of PNG's last chunk: as long as before, and still readable
    path.write_bytes(changed)
    assert load(folder_config(two)).revision not in (revision, renamed)


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    root = tree(tmp_path / "photos")
    first = load(folder_config(root))
    monkeypatch.setattr("s2a_cli.data.integrity._read_all", None)
    assert load(folder_config(root)).revision == first.revision


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, cache):
    cache.write_text("a file in the way")
    assert len(load(folder_config(tree(tmp_path / "photos"))).train) == 8


def test_a_link_to_itself_is_refused_in_a_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert title(folder_config(tmp_path / "loop")) == "loop"
    assert "loop" in folder_refusal(tmp_path / "loop")


def test_photos_behind_links_to_folders_are_found_once(tmp_path):
    tree(tmp_path / "photos", images=2)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "cats").symlink_to(tmp_path / "photos" / "cat")
    (tmp_path / "others" / "again").symlink_to(tmp_path / "others")
    (tmp_path / "others" / "twice").symlink_to(tmp_path / "photos" / "cat")
    assert [path.parent.name for path in photos.find([str(tmp_path / "others")])] == ["cats", "cats"]
