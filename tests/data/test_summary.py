"""What is said of a data set before training, and of an accuracy that needs none."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import folder_config, save, tree

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import Splits, describe, load, majority
from s2a_cli.data.images import ImageArray


def splits(*counts: tuple[int, int, int], names: list[str] | None = None) -> Splits:
    """Splits of blank images with counts[class] = (train, val, test)."""
    parts = []
    for split in range(3):
        labels = [label for label, of_class in enumerate(counts) for _ in range(of_class[split])]
        parts.append(ImageArray(np.zeros((len(labels), 2, 2, 3), np.uint8), labels))
    return Splits("photos", *parts, names or [f"class {label}" for label in range(len(counts))], "r")


def test_a_few_classes_get_a_line_each():
    found = splits((128, 32, 40), (3, 1, 1), names=["cat", "dog"])
    found.left_out = ["27 .heic (install s2a[heic] to read them)", "1 .txt"]
    assert describe(found).splitlines() == [
        "data: photos      train     val    test",
        "  cat               128      32      40  largest",
        "  dog                 3       1       1  smallest",
        "  all 2 classes     131      33      41",
        "  left out: 27 .heic (install s2a[heic] to read them)",
        "            1 .txt",
    ]


def test_many_classes_stay_short():
    assert describe(splits(*[(5, 1, 4)] * 102)).splitlines()[1:] == [
        "  each of 102 classes       5       1       4",
        "  all 102 classes         510     102     408",
    ]
    uneven = describe(
        splits(
            *[(5, 1, 4)] * 50,
            (9, 2, 8),
            (2, 1, 1),
            *[(5, 1, 4)] * 50,
            names=["x" * 50] * 50 + ["owl", "\x1b[2J\n"] + ["x"] * 50,
        )
    )
    assert uneven.splitlines()[1:3] == [
        "  owl                   9       2       8  largest",
        "  \\x1b[2J\\n             2       1       1  smallest",
    ]


def test_a_class_that_is_never_tested_is_said(tmp_path):
    root = tree(tmp_path / "photos")
    save(root / "lynx" / "only.png", 99)
    lines = describe(load(folder_config(root))).splitlines()
    assert "  never tested, as no image of it is in test: lynx (1 image)" in lines
    assert any(line.split() == ["lynx", "1", "0", "0", "smallest"] for line in lines)
    lines = describe(splits((4, 1, 1), (0, 0, 2), (3, 1, 0), (2, 0, 0))).splitlines()
    assert "  never tested, as no image of them is in test: class 2 (4 images), class 3 (2 images)" in lines
    assert "  never trained on, as no image of it is in train: class 1 (2 images)" in lines


def test_what_the_settings_leave_out_is_said(tmp_path):
    root = tree(tmp_path / "photos", images=10)
    assert load(folder_config(root, shots=2)).left_out == ["8 training images by dataset.shots=2"]
    assert load(folder_config(root, fraction=0.5)).left_out == ["6 training images by dataset.fraction=0.5"]
    assert load(DatasetConfig(name="digits")).left_out == []


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        (97.56, "97.56 % is no more than always answering 'cat' gives: 40 of 41 images in test are of that class"),
        (
            95.12,
            (
                "95.12 % is less than the 97.56 % that always answering 'cat' gives: 40 of 41 images in test are of"
                " that class"
            ),
        ),
        (100.0, None),
        (None, None),
    ],
)
def test_an_accuracy_that_needs_no_training_is_said(top1, said):
    assert majority(splits((128, 32, 40), (3, 1, 1), names=["cat", "dog"]), top1) == said
