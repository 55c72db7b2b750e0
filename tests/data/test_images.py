"""Image files of every kind, decoded to RGB."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import folder_config, picture, save, tree
from PIL import GifImagePlugin, Image, TiffImagePlugin
from refusals import folder_refusal

from s2a_cli.data import images, load
from s2a_cli.data.images import AVIF, open_rgb
from s2a_cli.data.sources import folder


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
    assert "eps.jpg is not a readable image (its content is none of JPEG" in folder_refusal(root)


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
    left_out = ["3 .heic (install s2a[heic] to read them)", "1 without an ending", "1 .db", "1 .txt"]
    assert load(folder_config(root)).left_out == left_out
    (root / "bird").mkdir()
    (root / "bird" / "0.heic").write_bytes(b"")
    assert "no image in" in folder_refusal(
        root
    ) and "but 1 .heic (install s2a[heic] to read them); accepted: .jpg" in folder_refusal(root)

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
