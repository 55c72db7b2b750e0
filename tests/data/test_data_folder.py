from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import folder_config, picture, save, tree
from PIL import Image

from s2a_cli.data import load
from s2a_cli.data.images import open_rgb
from s2a_cli.errors import UserError


def refusal(root: Path, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(folder_config(root, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize("val", [None, "val", "valid", "validation"])
def test_split_trees(tmp_path, val):
    for seed, (name, images) in enumerate([("train", 5), ("test", 3), (val, 2)]):
        if name:
            tree(tmp_path / name, images=images, seed=1000 * seed)
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
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("")
    assert "neither a folder nor an archive" in refusal(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refusal(tmp_path / "empty")
    root = tree(tmp_path / "photos")
    (root / "bird").mkdir()
    (root / "bird" / "readme.md").write_text("no image yet")
    assert f"no image in {root / 'bird'}" in refusal(root)
    assert "one class folder, 'cat'" in refusal(tree(tmp_path / "single", classes=["cat"]))
    assert "no class has the two images" in refusal(tree(tmp_path / "scarce", images=1))


def test_split_trees_that_do_not_agree_are_refused(tmp_path):
    tree(tmp_path / "train")
    assert "has train but no test" in refusal(tmp_path)
    tree(tmp_path / "test", classes=["cat", "bird", "cow"])
    assert f"{tmp_path / 'test'} has classes that train does not have: bird, cow" in refusal(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert "has test but no train" in refusal(tmp_path)


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
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    assert "damaged" in refusal(tmp_path / "bad.tar")


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


# damaged images


def damage(root: Path) -> list[Path]:
    truncated = save(root / "cat" / "truncated.jpg", 7, size=(64, 64))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    text = root / "cat" / "text.png"
    text.write_text("<html>not found</html>")
    empty = root / "dog" / "empty.gif"
    empty.write_bytes(b"")
    broken = save(root / "dog" / "broken.png", 8, size=(64, 64))
    broken.write_bytes(broken.read_bytes()[:100] + bytes(50) + broken.read_bytes()[150:])
    return [truncated, text, empty, broken]


def test_damaged_images_stop_the_run(tmp_path):
    root = tree(tmp_path / "photos")
    bad = damage(root)
    message = refusal(root)
    assert all(path.name in message for path in bad) and "and 3 more" in message and "on_corrupt=skip" in message
    for path in bad[1:]:
        path.unlink()
    message = refusal(root)
    assert message.startswith(f"{bad[0]} is not a readable image (") and "truncated" in message


def test_damaged_images_are_left_out(tmp_path, caplog):
    root = tree(tmp_path / "photos")
    clean = load(folder_config(root))
    bad = damage(root)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        splits = load(folder_config(root, on_corrupt="skip"))
        assert sum(map(len, (splits.train, splits.val, splits.test))) == 12
        assert len(caplog.messages) == len(bad)
        assert all(any(str(path) in line for line in caplog.messages) for path in bad)
    assert splits.revision != clean.revision


def test_a_class_of_damaged_images_alone(tmp_path):
    root = tree(tmp_path / "photos")
    damage(root)
    (root / "bird").mkdir()
    (root / "bird" / "0.png").write_text("no image")
    assert "no readable image in class 'bird'" in refusal(root, on_corrupt="skip")


def test_a_file_that_cannot_be_opened(tmp_path):
    root = tree(tmp_path / "photos")
    (root / "cat" / "link.png").symlink_to(tmp_path / "gone.png")
    assert f"{root / 'cat/link.png'} cannot be read" in refusal(root)


def test_an_image_damaged_later_is_named(tmp_path):
    root = tree(tmp_path / "photos")
    splits = load(folder_config(root))
    Path(splits.train.name(0)).write_bytes(b"overwritten")
    with pytest.raises(UserError, match="is not a readable image") as error:
        splits.train[0]
    assert splits.train.name(0) in str(error.value)


# what is decoded


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", ".jpg"), ("CMYK", ".jpg"), ("1", ".png"), ("P", ".gif"), ("RGB", ".webp"), ("RGB", ".bmp"),
        ("RGB", ".tif"), ("L", ".pgm"), ("RGB", ".ppm"),
    ],
)  # fmt: skip
def test_modes_and_formats_become_rgb(tmp_path, mode, suffix):
    original = picture(3, size=(40, 30), mode=mode)
    original.save(tmp_path / f"image{suffix}")
    found = open_rgb(tmp_path / f"image{suffix}")
    assert found.mode == "RGB" and found.size == (40, 30)
    difference = np.abs(np.asarray(found, int) - np.asarray(original.convert("RGB"), int))
    assert difference.mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "image.png")
    found = open_rgb(tmp_path / "image.png")
    assert [found.getpixel(at) for at in ((0, 0), (1, 1))] == [(0, 0, 0), (255, 255, 255)]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 256, 65535, 32768]], np.uint16)
    Image.fromarray(values).save(tmp_path / "image.png")
    assert [pixel[0] for pixel in np.asarray(open_rgb(tmp_path / "image.png"))[0]] == [0, 1, 255, 128]


def test_photos_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "image.jpg", exif=exif)
    assert open_rgb(tmp_path / "image.jpg").size == (20, 40)


def test_large_photos_are_reduced_while_decoding_and_others_are_not(tmp_path):
    path = save(tmp_path / "image.jpg", 5, size=(400, 240))
    whole = open_rgb(path)
    assert whole.size == (400, 240)
    assert open_rgb(path, at_least=121).tobytes() == whole.tobytes()
    reduced = open_rgb(path, at_least=60)
    assert reduced.size == (100, 60)
    expected = np.asarray(whole.resize((100, 60), Image.Resampling.BOX), int)
    assert np.abs(np.asarray(reduced, int) - expected).mean() < 3


# real photos


@pytest.mark.parametrize(
    ("folder", "classes", "train", "test"),
    [
        ("flowers5", 5, 150, 100),
        ("pacs/photo", 7, 140, 98),
        ("pacs/sketch", 7, 140, 98),
        ("cifar10_subset", 10, 600, 300),
    ],
)
def test_real_folders(real_data, folder, classes, train, test):
    splits = load(folder_config(real_data / folder))
    assert (len(splits.classes), len(splits.train) + len(splits.val), len(splits.test)) == (classes, train, test)
    assert np.bincount(splits.val.labels).tolist() == [round(0.2 * train / classes)] * classes
    assert splits.test[0][0].mode == "RGB"


def test_real_grey_photos(real_data):
    splits = load(folder_config(real_data / "dtd6_textures"))
    assert len(splits.train) + len(splits.val) == 180
    grey = []
    for split in (splits.train, splits.val, splits.test):
        for index in range(len(split)):
            with Image.open(split.name(index)) as image:
                if image.mode != "RGB":
                    grey.append(split[index][0].mode)
    assert grey == ["RGB", "RGB"]


@pytest.mark.slow
def test_a_real_archive(real_data):
    splits = load(folder_config(real_data / "cifar10_5k.tar", shots=10))
    assert (splits.name, len(splits.classes)) == ("cifar10_5k", 10)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (100, 1000, 2000)


def test_a_real_photo_cut_short(real_data, tmp_path):
    root = tree(tmp_path / "photos")
    photo = sorted((real_data / "flowers5/train/daisy").iterdir())[0]
    content = photo.read_bytes()
    (root / "cat" / "photo.jpg").write_bytes(content[: len(content) // 2])
    assert "photo.jpg is not a readable image" in refusal(root)
