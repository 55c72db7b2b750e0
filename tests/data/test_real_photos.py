"""Real photos in the folder S2A_REAL_DATA, if it is set."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import folder_config, tree
from PIL import Image
from refusals import folder_refusal

from s2a_cli.data import load


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
    assert "photo.jpg is not a readable image" in folder_refusal(root)
