from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pictures import folder_config, tree

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import CONF
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import DATASETS, load, problems
from s2a_cli.data.splits import few_shots, hold_out, share, shuffled

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_held_out_and_kept_are_all_there_is(labels, fraction, seed):
    kept, held = hold_out(labels, fraction, seed, "val")
    assert sorted(kept + held) == list(range(len(labels)))
    all_, out = Counter(labels), Counter(labels[index] for index in held)
    for label, count in all_.items():
        assert count == 1 or 1 <= out[label] <= count - 1
        assert abs(out[label] - fraction * count) <= 1
    assert (kept, held) == hold_out(labels, fraction, seed, "val")


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, fraction=st.floats(0.01, 1.0), seed=st.integers(0, 9))
def test_a_share_keeps_the_balance(labels, fraction, seed):
    chosen = share(labels, fraction, seed)
    assert chosen == sorted(set(chosen))
    counts = Counter(labels[index] for index in chosen)
    for label, count in Counter(labels).items():
        assert counts[label] == max(1, int(fraction * count + 0.5))


def test_few_shots():
    labels = [0, 1] * 10 + [1] * 5
    chosen = few_shots(labels, 4, 0, ["a", "b"])
    assert Counter(labels[index] for index in chosen) == {0: 4, 1: 4}
    assert chosen != few_shots(labels, 4, 1, ["a", "b"])
    assert set(chosen) < set(few_shots(labels, 5, 0, ["a", "b"]))  # more shots add to fewer
    with pytest.raises(UserError, match=r"shots=11, but class 'a' has 10 training images"):
        few_shots(labels, 11, 0, ["a", "b"])
    with pytest.raises(UserError, match="class 'c' has 0 training images"):
        few_shots(labels, 1, 0, ["a", "b", "c"])


def test_the_order_is_the_same_everywhere_and_for_ever():
    assert shuffled(range(10), 0, "val") == [2, 0, 8, 5, 1, 9, 4, 6, 3, 7]
    assert shuffled(range(10), 1, "val") != shuffled(range(10), 0, "val") != shuffled(range(10), 0, "test")


def test_few_shots_come_out_of_what_validation_leaves(tmp_path):
    root = tree(tmp_path / "photos", images=10)
    whole = load(folder_config(root))
    few = load(folder_config(root, shots=6))
    assert Counter(few.train.labels) == {0: 6, 1: 6}
    assert [few.val.name(i) for i in range(4)] == [whole.val.name(i) for i in range(4)]
    with pytest.raises(UserError, match=r"class 'cat' has 6 training images once validation is split off"):
        load(folder_config(root, shots=7))
    half = load(folder_config(root, fraction=0.5))
    assert Counter(half.train.labels) == {0: 3, 1: 3} and half.test.labels == whole.test.labels


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"name": "cifr10"}, "did you mean 'cifar10'"),
        ({"shots": 0}, "dataset.shots=0"),
        ({"shots": -3}, "dataset.shots=-3"),
        ({"fraction": 0.0}, "dataset.fraction=0.0"),
        ({"fraction": -0.5}, "dataset.fraction=-0.5"),
        ({"fraction": 1.5}, "dataset.fraction=1.5"),
        ({"fraction": float("nan")}, "dataset.fraction=nan"),
        ({"val_fraction": 1.0}, "dataset.val_fraction=1.0"),
        ({"test_fraction": 0.0}, "dataset.test_fraction=0.0"),
        ({"shots": 1, "fraction": 0.5}, "exclude each other"),
        ({"on_corrupt": "ignore"}, "dataset.on_corrupt=ignore"),
        ({"scale": [0.5, 1.5]}, "dataset.scale="),
        ({"scale": [0.5]}, "dataset.scale="),
        ({"hflip": 2.0}, "dataset.hflip=2.0"),
        ({"domain": "real"}, "dataset.domain is for dataset=domainnet and dataset=folder, not digits"),
        ({"name": "domainnet"}, "needs dataset.domain"),
        ({"name": "domainnet", "domain": "reel"}, "did you mean 'real'"),
        ({"name": "folder"}, "needs dataset.root"),
    ],
)
def test_bad_settings_are_named_before_anything_is_read(setting, words):
    config = DatasetConfig(**({"name": "digits"} | setting))
    assert any(words in line for line in problems(config))
    with pytest.raises(UserError, match="dataset"):
        load(config)


def test_composed_settings_are_judged_alike():
    good = OmegaConf.structured(DatasetConfig(name="digits", scale=[0.8, 1.0]))
    assert problems(good) == [] and len(load(good).classes) == 10
    bad = OmegaConf.structured(DatasetConfig(name="digits", scale=[1.0, 0.8], shots=0))
    assert [line.split("=")[0] for line in problems(bad)] == ["dataset.shots", "dataset.scale"]


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_its_file_of_settings(name):
    text = (CONF / "dataset" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) <= 120
    config = OmegaConf.merge(OmegaConf.structured(DatasetConfig), OmegaConf.create(text))
    assert config.name == name
    needed = {
        "folder": ["dataset=folder needs dataset.root=FOLDER, your images"],
        "table": ["dataset=table needs dataset.file=FILE, a table of paths and labels"],
    }
    assert problems(config) == needed.get(name, [])


def test_good_settings_have_no_problems():
    assert problems(DatasetConfig(name="digits", shots=4, scale=None, hflip=0.0)) == []
    assert problems(DatasetConfig(name="domainnet", domain="real", test_domain="sketch", fraction=1.0)) == []
