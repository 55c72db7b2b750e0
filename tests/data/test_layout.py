"""Which folders of the user's data are splits and which are classes, and what links between them do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import folder_config, save, tree
from refusals import folder_refusal

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import describe, load, problems
from s2a_cli.planner.run_memory import sizes


def splits_of(root: Path, *names: str, classes=("cat", "dog"), images: int = 3) -> Path:
    for number, name in enumerate(names):
        tree(root / name, classes=classes, images=images, seed=1000 * number)
    return root


def counts(root: Path, **settings) -> tuple[int, int, int]:
    splits = load(folder_config(root, **settings))
    return len(splits.train), len(splits.val), len(splits.test)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing", "VALIDATION"), ("TRAIN", "VAL", "test")])
def test_splits_are_known_in_any_case(tmp_path, names):
    splits = load(folder_config(splits_of(tmp_path, *names)))
    assert splits.classes == ["cat", "dog"] and len(splits.test) == 6
    assert all(f"/{names[0]}/" in splits.train.name(index) for index in range(len(splits.train)))
    assert sizes(DatasetConfig(name="folder", root=str(tmp_path)))[0] == 2


@pytest.mark.parametrize(
    "names", [("train", "test", "val", "validation"), ("train", "Training", "test"), ("train", "test", "TEST")]
)
def test_two_names_for_one_split_are_both_named(tmp_path, names):
    message = folder_refusal(splits_of(tmp_path, *names))
    twice = {"val": ("val", "validation"), "train": ("Training", "train"), "test": ("TEST", "test")}
    pair = next(pair for pair in twice.values() if set(pair) <= set(names))
    assert f"has {pair[0]} and {pair[1]}, both of which name" in message and "dataset.layout=classes" in message


@pytest.mark.parametrize(
    "names",
    [
        ("training_set", "test_set"), ("train2017", "val2017"), ("trainImages", "testImages"), ("fold1", "fold2"),
        ("session a", "session b", "session c"), ("cat", "dog"),
    ],
)  # fmt: skip
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path, names):
    root = splits_of(tmp_path, *names, classes=["young", "old"], images=10)
    message = folder_refusal(root)
    assert f"has {', '.join(sorted(names))}" in message
    assert "say dataset.layout=splits or dataset.layout=classes" in message
    assert load(folder_config(root, layout="classes")).classes == sorted(names)
    assert "but no train and no test: as splits" in folder_refusal(root, layout="splits")


def test_what_is_a_tree_of_classes_all_the_same(tmp_path):
    """Class folders with folders in them, of which not all have the same, or beside which there are images."""
    assert counts(splits_of(tmp_path / "one", "cat", "dog", classes=["images"], images=5)) == (6, 2, 2)
    root = splits_of(tmp_path / "mixed", "cat", "dog", classes=["2019", "2020"], images=5)
    for name in ("cat", "dog"):
        save(root / name / "loose.png", 9)
    assert load(folder_config(root)).classes == ["cat", "dog"]
    root = splits_of(tmp_path / "some", "cat", "dog", classes=["2019", "2020"], images=5)
    tree(root, classes=["bird"], images=5)
    assert load(folder_config(root)).classes == ["bird", "cat", "dog"]
    assert (
        load(folder_config(tree(tmp_path / "stations", classes=["train_station", "bus_station"]))).classes[1]
        == "train_station"
    )


def test_classes_that_are_called_like_splits(tmp_path):
    root = tree(tmp_path / "vehicles", classes=["bus", "car", "train"])
    message = folder_refusal(root)
    assert "has train but no test: as splits, give it the folders train, test" in message
    assert "if these are 3 classes, say dataset.layout=classes" in message
    splits = load(folder_config(root, layout="classes"))
    assert splits.classes == ["bus", "car", "train"]
    assert sizes(DatasetConfig(name="folder", root=str(root), layout="classes"))[0] == 3
    both = tree(tmp_path / "both", classes=["test", "train"])
    assert "has no class folders" in folder_refusal(both)
    assert "if these are 2 classes, say dataset.layout=classes" in folder_refusal(both)
    assert load(folder_config(both, layout="classes")).classes == ["test", "train"]


def test_the_setting_is_judged(tmp_path):
    assert problems(DatasetConfig(name="folder", root="x", layout="tree")) == [
        "dataset.layout=tree: expected one of splits, classes, domains"
    ]
    assert "dataset.layout is for dataset=folder" in problems(DatasetConfig(name="digits", layout="splits"))[0]


def test_a_folder_beside_the_splits_is_said(tmp_path):
    root = splits_of(tmp_path / "photos", "train", "test", "unlabelled")
    assert load(folder_config(root)).left_out == ["unlabelled/, which is no split"]


def test_a_wrapped_folder_is_suggested(tmp_path):
    tree(tmp_path / "photos")
    assert f"is dataset.root={tmp_path / 'photos'} what you mean?" in folder_refusal(tmp_path)


# links


def test_loops_of_links_copy_nothing(tmp_path):
    root = splits_of(tmp_path / "photos", "train", "test")
    plain = load(folder_config(root))
    (root / "train" / "cat" / "again").symlink_to(".")
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "train" / "dog" / "cats").symlink_to("../cat")
    (root / "train" / "dog" / "tested").symlink_to("../../test/dog")
    (root / "train" / "dog" / "tested.png").symlink_to("../../test/dog/0.png")
    (root / "test" / "dog" / "all").symlink_to(tmp_path)
    (root / "test" / "dog" / "everything").symlink_to("/")
    splits = load(folder_config(root))
    assert splits.revision == plain.revision
    (said,) = splits.left_out
    assert said.startswith("6 links to other classes, splits or the folder above (train/cat/up, ")


def test_links_that_lead_elsewhere_are_followed_once(tmp_path):
    """A tree of links to a pool is how many make splits."""
    pool = tree(tmp_path / "pool", classes=["a", "b", "c", "d"], images=5)
    root = tmp_path / "photos"
    for name, source in (("cat", "a"), ("dog", "b")):
        (root / name).mkdir(parents=True)
        for path in sorted((pool / source).iterdir()):
            (root / name / path.name).symlink_to(path)
    (root / "cat" / "more").symlink_to(pool / "c")
    (root / "cat" / "more again").symlink_to(pool / "c")
    (pool / "c" / "loop").symlink_to(pool / "c")
    (root / "bird").symlink_to(pool / "d")
    splits = load(folder_config(root))
    assert (
        splits.classes == ["bird", "cat", "dog"]
        and splits.counts().sum(1).tolist() == [5, 10, 5]
        and not splits.left_out
    )
    (root / "dog" / "more").symlink_to(pool / "c")
    assert "dog/more is a folder of cat, too: its images would be in both" in folder_refusal(root)


def test_a_split_or_a_class_that_is_a_link_to_another_is_refused(tmp_path):
    root = splits_of(tmp_path, "train", "test")
    (root / "val").symlink_to("test")
    said = folder_refusal(root)
    assert f"{root}/val is a link to {root}/test: the val split would have the images of another" in said
    (root / "val").unlink()
    (root / "train" / "kitten").symlink_to("cat")
    assert f"kitten is a link to {root}/train/cat: its images would be in two classes or splits" in folder_refusal(root)


def test_an_image_in_two_splits_or_classes_is_said(tmp_path):
    root = splits_of(tmp_path, "train", "test")
    (root / "test" / "cat" / "copy.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    (root / "train" / "dog" / "twin.png").write_bytes((root / "train" / "cat" / "1.png").read_bytes())
    said = describe(load(folder_config(root)))
    assert "the same image in two splits: once, such as test/cat/copy.png (test) and train/cat/0.png (train)" in said
    assert "the same image in two classes: once, such as train/cat/1.png (" in said
