from __future__ import annotations

import errno
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import folder_config, picture, save, tree
from PIL import GifImagePlugin, Image, TiffImagePlugin

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import open_regular
from s2a_cli.data import folder, images, integrity, load
from s2a_cli.data.images import AVIF, open_rgb


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
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal(tmp_path / "no\nwhere") and "names of at most 255 bytes" in refusal(
        tmp_path / ("x" * 5000)
    )
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
    message = refusal(tmp_path)
    assert "has train but no test" in message and "dataset.layout=classes" in message
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


def test_damaged_images_are_left_out(tmp_path):
    root = tree(tmp_path / "photos")
    clean = load(folder_config(root))
    bad = damage(root)
    for _ in range(2):  # the second time from the cache
        splits = load(folder_config(root, on_corrupt="skip"))
        assert sum(map(len, (splits.train, splits.val, splits.test))) == 12
        (said,) = splits.left_out
        assert said.startswith("4 that can't be read (cat/text.png: its content is none of JPEG, ")
        assert all(path.relative_to(root).as_posix() in said for path in bad)
    assert splits.revision != clean.revision


def test_a_class_of_damaged_images_alone(tmp_path):
    root = tree(tmp_path / "photos")
    damage(root)
    (root / "bird").mkdir()
    (root / "bird" / "0.png").write_text("no image")
    assert "no readable image in class 'bird'" in refusal(root, on_corrupt="skip")


def test_what_is_no_file_is_a_damaged_image(tmp_path):
    root = tree(tmp_path / "photos")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    (root / "cat" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "cat" / "pipe.png")
    message = refusal(root)
    assert (
        message.startswith(f"{root / 'cat/gone.png'} is not a readable image (a link to what is not there)")
        and "and 3 more" in message
    )
    for _ in range(2):
        splits = load(folder_config(root, on_corrupt="skip"))
        assert len(splits.train) + len(splits.val) + len(splits.test) == 12
        assert (
            "cat/pipe.png: a pipe, not a file" in splits.left_out[0]
            and "cat/zero.png: a device, not a file" in splits.left_out[0]
        )
    shutil.copy(root / "cat" / "0.png", tmp_path / "gone.png")
    assert len(load(folder_config(root, on_corrupt="skip")).train) == 9, "the link leads to something now"


def test_a_file_that_can_not_be_opened_for_now_is_tried_again(tmp_path, monkeypatch):
    root = tree(tmp_path / "photos")

    def fails(path):
        if path.name == "3.png":
            raise OSError(errno.EIO, "Input/output error")
        return open_regular(path)

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "open_regular", fails)
        assert "and 1 more" in refusal(root)
    assert len(load(folder_config(root)).train) == 8


def test_a_file_larger_than_an_image_can_be_is_not_read(tmp_path):
    root = tree(tmp_path / "photos")
    with open(root / "cat" / "large.png", "wb") as stream:
        stream.truncate(3 << 30)  # of which the disk holds nothing
    assert "large.png is not a readable image (3.2 GB, more than an image has)" in refusal(root)


def test_a_change_that_size_and_time_do_not_tell_is_seen(tmp_path):
    root = tree(tmp_path / "photos", suffix=".bmp")
    first = load(folder_config(root)).revision
    path = root / "cat" / "0.bmp"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    for replaced in (False, True):
        content[-4] ^= 1
        if replaced:  # as an archive does that is unpacked again
            path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
        now = load(folder_config(root)).revision
        assert now != first
        first = now


@pytest.mark.parametrize(
    "kept", ["", "{}", "[]", '{"revision": 1, "damaged": {}, "dark": [], "same": []}', "[" * 10**5]
)
def test_a_kept_report_that_is_damaged_is_made_again(tmp_path, cache, kept):
    root = tree(tmp_path / "photos")
    first = load(folder_config(root))
    (report,) = (cache / "folder" / "checked").iterdir()
    report.write_text(kept)
    assert load(folder_config(root)).revision == first.revision


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


def tiff(path: Path, values: np.ndarray, **tags) -> Path:
    image, info = Image.fromarray(values), TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[NAMED[name]] = value
    image.save(path, tiffinfo=info)
    return path


NAMED = {"MinSampleValue": 280, "MaxSampleValue": 281, "SMinSampleValue": 340, "SMaxSampleValue": 341}


@pytest.mark.parametrize(
    ("values", "tags", "expected"),
    [
        (np.float32([0, 0.25, 1]), {}, [0, 64, 255]),
        (np.float32([-1, 0, 1]), {}, [0, 128, 255]),
        (np.float32([0, 64, 255]), {}, [0, 64, 255]),
        (np.float32([0, 257 * 64, 65535]), {}, [0, 64, 255]),
        (np.float32([0, np.nan, 1]), {}, [0, 0, 255]),
        (np.float32([np.nan, np.nan, np.nan]), {}, [0, 0, 0]),
        (np.float32([-1000, 0, 3000]), {}, [0, 64, 255]),  # Hounsfield units
        (np.float32([0, 0.25, 0.5]), {"SMaxSampleValue": 0.5}, [0, 128, 255]),
        (np.float32([0.5, 0.75, 1]), {"SMinSampleValue": 0.5, "SMaxSampleValue": 1.0}, [0, 128, 255]),
        (np.uint16([0, 1024, 4095]), {"MaxSampleValue": 4095}, [0, 64, 255]),
        (np.uint16([0, 16384, 65535]), {"MaxSampleValue": 255}, [0, 64, 255]),  # a file that contradicts itself
        (np.uint16([0, 16384, 65535]), {}, [0, 64, 255]),
        (np.int32([0, 16384, 65535]), {}, [0, 64, 255]),
        (np.int32([0, 10**8, 4 * 10**8]), {}, [0, 64, 255]),
    ],
)
def test_deep_grey_values_are_scaled_by_what_the_file_says(tmp_path, values, tags, expected):
    path = tiff(tmp_path / "image.tif", values[None], **tags)
    assert np.asarray(open_rgb(path))[0, :, 0].tolist() == expected


def test_images_that_come_out_black_are_said(tmp_path):
    root = tree(tmp_path / "photos")
    assert load(folder_config(root)).notes == []
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(root / "cat" / "twelve bits.png")
    Image.fromarray(np.full((8, 8), 255, np.uint16)).save(root / "dog" / "eight bits.tif")
    (note,) = load(folder_config(root)).notes
    assert note.startswith("nearly black: 2 (cat/twelve bits.png, dog/eight bits.tif): no value reaches 16 of 255")


def test_a_format_of_another_ending_is_read_and_one_that_starts_a_program_is_not(tmp_path, monkeypatch):
    picture(1).save(tmp_path / "png.jpg", "PNG")
    assert open_rgb(tmp_path / "png.jpg").size == (12, 10)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # as a call would raise
    root = tree(tmp_path / "photos")
    picture(1).save(root / "cat" / "eps.jpg", "EPS")
    picture(1).save(root / "cat" / "eps.tif", "EPS")
    for format_ in ("EPS", "PCX", "TGA", "SGI", "PDF"):
        picture(1).save(tmp_path / "other.png", format_)
        with pytest.raises(ValueError, match="its content is none of JPEG, PNG"):
            open_rgb(tmp_path / "other.png")
    assert "eps.jpg is not a readable image (its content is none of JPEG" in refusal(root)


@pytest.mark.skipif(not AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    root = tree(tmp_path / "photos", suffix=".avif")
    assert len(load(folder_config(root)).train) == 8


def test_heic_is_read_with_pillow_heif_and_else_left_out_with_its_count(tmp_path, monkeypatch):
    root = tree(tmp_path / "photos")
    for index in range(3):
        (root / "cat" / f"IMG_{index}.HEIC").write_bytes(b"ftypheic")
    for name in ("notes.txt", "README", "Thumbs.db"):
        (root / "dog" / name).write_text("")
    monkeypatch.setattr(
        folder, "EXTENSIONS", tuple(ending for ending in images.EXTENSIONS if not ending.startswith(".hei"))
    )
    left_out = ["3 .heic (install pillow-heif to read them)", "1 without an ending", "1 .db", "1 .txt"]
    assert load(folder_config(root)).left_out == left_out
    (root / "bird").mkdir()
    (root / "bird" / "0.heic").write_bytes(b"")
    assert "no image in" in refusal(
        root
    ) and "but 1 .heic (install pillow-heif to read them); accepted: .jpg" in refusal(root)

    class Heif:
        @staticmethod
        def register_heif_opener():
            Image.register_open("HEIF", GifImagePlugin.GifImageFile, lambda prefix: prefix.startswith(b"GIF"))

    monkeypatch.setattr(folder, "EXTENSIONS", (*images.EXTENSIONS, ".heic"))
    monkeypatch.setattr(images, "HEIF", True)
    monkeypatch.setitem(sys.modules, "pillow_heif", Heif)
    images._heif.cache_clear()
    for path in root.glob("*/*.[hH]*"):
        picture(7).save(path, "GIF")
    assert (
        sum(len(getattr(load(folder_config(root, on_corrupt="skip")), name)) for name in ("train", "val", "test")) == 16
    )


def test_an_image_beside_the_class_folders_is_said(tmp_path):
    root = tree(tmp_path / "photos")
    save(root / "montage.png", 1)
    assert load(folder_config(root)).left_out == [f"1 image in no class folder ({root}/montage.png)"]


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
    photo = min((real_data / "flowers5/train/daisy").iterdir())
    content = photo.read_bytes()
    (root / "cat" / "photo.jpg").write_bytes(content[: len(content) // 2])
    assert "photo.jpg is not a readable image" in refusal(root)
