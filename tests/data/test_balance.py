"""Weights of classes and images, draws by them, splits of groups and of several labels, and where images lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import folder_config, save, tree
from refusals import folder_refusal

from s2a_cli.data import class_weights, image_weights, load
from s2a_cli.data.batches import Batches
from s2a_cli.data.images import ImageArray
from s2a_cli.data.splits import few_shots, hold_out_groups, share


def images(labels, classes=None) -> ImageArray:
    made = ImageArray(np.zeros((len(labels), 1, 1, 3), np.uint8), labels)
    made.classes = classes
    return made


def test_weights_make_up_for_counts():
    single = images([0] * 6 + [1] * 2 + [3])
    weights = class_weights(single, 4)
    np.testing.assert_allclose(weights * single.counts(4), [3, 3, 0, 3])  # each class that occurs counts alike
    assert np.mean([weights[label] for label in single.labels]) == pytest.approx(1)
    drawn = image_weights(single, 4)
    np.testing.assert_allclose([drawn[:6].sum(), drawn[6:8].sum(), drawn[8]], [1, 1, 1])
    several = images([(0, 1), (0,), (0,), ()], classes=3)
    np.testing.assert_allclose(class_weights(several, 3), [1 / 3, 3, 1])  # images without it / images with it
    np.testing.assert_allclose(image_weights(several, 3), [1, 1 / 3, 1 / 3, 1])


def test_a_sampler_draws_rare_classes_as_often_and_again_alike():
    labels = [0] * 180 + [1] * 20
    made = Batches(200, 64, seed=3, epoch=1, train=True, part=(0, 1), weights=image_weights(images(labels), 2))
    keys = [key for batch in made for key in batch]
    assert keys == [key for batch in made for key in batch] and len(keys) == 200 and len(set(keys)) == 200
    assert 70 <= sum(labels[key[1]] for key in keys) <= 130
    often = Counter(key[1] for key in keys)
    most = often.most_common(1)[0][0]
    mine = [key for key in keys if key[1] == most]  # another augmentation for each time that it is drawn
    assert mine == [(1, most), *((1, most, again) for again in range(1, often[most]))]
    parts = [Batches(200, 64, 3, 1, True, (rank, 2), made.weights) for rank in range(2)]
    assert sorted(key for part in parts for batch in part for key in batch) == sorted(keys)


@pytest.mark.parametrize("seed", range(3))
def test_several_labels_are_held_out_in_proportion(seed):
    draw = np.random.default_rng(seed)
    labels = [tuple(np.flatnonzero(draw.random(6) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).tolist()) for _ in range(500)]
    kept, held = hold_out_groups(labels, None, 0.2, seed, "test")
    assert sorted(kept + held) == list(range(500))
    total, out = (Counter(label for index in part for label in labels[index]) for part in (range(500), held))
    for label, count in total.items():
        assert abs(out[label] - 0.2 * count) <= 2 + 0.02 * count
        assert count < 2 or 0 < out[label] < count
    assert hold_out_groups(labels, None, 0.2, seed, "test") == (kept, held)
    shots = Counter(label for index in few_shots(labels, 3, seed, list("abcdef")) for label in labels[index])
    assert min(shots.values()) >= 3
    tenth = Counter(label for index in share(labels, 0.1, seed) for label in labels[index])
    assert all(tenth[label] >= int(0.1 * count) for label, count in total.items())


def test_groups_are_kept_together_whatever_their_size():
    groups = ["big"] * 40 + [f"small {index // 3}" for index in range(30)] + ["lone"] * 5
    labels = [(0,)] * 70 + [(1,)] * 5
    kept, held = hold_out_groups(labels, groups, 0.2, 0, "test")
    assert {groups[i] for i in kept}.isdisjoint(groups[i] for i in held)
    assert 12 <= len(held) <= 18 and all(groups[i].startswith("small") for i in held)  # a lone group is trained on


def test_images_of_a_folder_are_grouped(tmp_path):
    for animal in range(6):
        for index in range(2):
            for name in ("cat", "dog"):
                save(tmp_path / "photos" / name / f"a{animal}" / f"IMG{animal}_{index}.png", 100 * animal + index)
    for hold_out in ("parent", r"IMG(\d+)_", r"a\d"):
        splits = load(folder_config(tmp_path / "photos", layout="classes", hold_out=hold_out))
        groups = [set(part.groups) for part in (splits.train, splits.val, splits.test)]
        assert sum(map(len, groups)) == len(set.union(*groups)) == (12 if hold_out == "parent" else 6)
    flat = tree(tmp_path / "flat")
    assert "names no group of images" in folder_refusal(flat, hold_out="parent")
    assert "is no regular expression" in folder_refusal(flat, hold_out="(")


def test_domains_and_a_test_folder_elsewhere(tmp_path):
    for seed, domain in enumerate(("photo", "sketch", "cartoon")):
        tree(tmp_path / "pacs" / domain, images=4 + seed, seed=1000 * seed)
    assert "for domains say dataset.layout=domains" in folder_refusal(tmp_path / "pacs")
    every = load(folder_config(tmp_path / "pacs", layout="domains"))
    assert every.classes == ["cat", "dog"] and every.counts().sum() == 30
    left_out = load(folder_config(tmp_path / "pacs", test_domain="sketch"))
    assert (left_out.name, len(left_out.test), len(left_out.train) + len(left_out.val)) == ("pacs-to-sketch", 10, 20)
    one = load(folder_config(tmp_path / "pacs", domain="photo", test_domain="sketch"))
    assert (one.name, len(one.train) + len(one.val)) == ("pacs-photo-to-sketch", 8)
    assert one.left_out == ["cartoon/, which is not asked for"]
    assert "did you mean 'sketch'" in folder_refusal(tmp_path / "pacs", test_domain="scetch")
    assert "leaves no domain" in folder_refusal(tmp_path / "pacs", domain="photo", test_domain="photo")

    for seed, domain in enumerate(("photo", "sketch")):
        for split, images in (("train", 5), ("test", 2)):
            tree(tmp_path / "official" / domain / split, images=images, seed=1000 * seed)
    official = load(folder_config(tmp_path / "official", layout="domains"))
    assert (official.classes, len(official.train) + len(official.val), len(official.test)) == (["cat", "dog"], 20, 8)
    across = load(folder_config(tmp_path / "official", test_domain="sketch"))
    assert (len(across.train) + len(across.val), len(across.test)) == (10, 4)
    tree(tmp_path / "official" / "cartoon")
    assert "give every domain the same splits" in folder_refusal(tmp_path / "official", layout="domains")

    photo, elsewhere = tmp_path / "pacs" / "photo", tree(tmp_path / "elsewhere", classes=["dog"], seed=9)
    save(elsewhere / "dog" / "again.png", 0)  # as the first cat
    splits = load(folder_config(photo, test_root=str(elsewhere)))
    assert [path.parent.name for path in map(splits.test.root.joinpath, splits.test.files)] == ["dog"] * 7
    assert len(splits.train) + len(splits.val) == 8 and splits.same == [["cat/0.png", str(elsewhere / "dog/again.png")]]
    assert splits.test[0][0].size == (12, 10)
    tree(tmp_path / "more", classes=["cow"])
    assert "has classes that train does not have: cow" in folder_refusal(photo, test_root=str(tmp_path / "more"))
    assert f"dataset.test_root={tmp_path / 'no'} does not exist" in folder_refusal(
        photo, test_root=str(tmp_path / "no")
    )


def test_a_test_root_among_the_classes_is_refused(tmp_path):
    """Its images would be those of one more class."""
    root = tree(tmp_path / "photos")
    tree(root / "holdout", seed=9)
    (tmp_path / "link").symlink_to(root / "holdout")
    for there in (root / "holdout", tmp_path / "link", root, tmp_path):
        said = folder_refusal(root, test_root=str(there))
        assert f"dataset.test_root={there} and {root}, whose folders are classes to train on, share images" in said
    for name in ("train", "test"):
        tree(tmp_path / "splits" / name, images=5, seed=20 * len(name))
    splits = load(folder_config(tmp_path / "splits", test_root=str(tmp_path / "splits" / "test")))
    assert splits.classes == ["cat", "dog"] and len(splits.test) == 10


def test_a_test_root_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    """Whether root is relative or not."""
    tree(tmp_path / "sub" / "photos")
    tree(tmp_path / "sub" / "tst", classes=["dog"], images=2, seed=9)
    monkeypatch.chdir(tmp_path)
    for root in (Path("sub/photos"), tmp_path / "sub" / "photos"):
        splits = load(folder_config(root, test_root="sub/tst"))
        assert splits.test[1][0].size == (12, 10) and splits.test.name(1) == str(tmp_path / "sub/tst/dog/1.png")
    tree(tmp_path / "w1", classes=["cow"])
    assert f"{tmp_path / 'w1'} has classes that train" in folder_refusal(Path("sub/photos"), test_root="w1")
