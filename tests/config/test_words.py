"""The words that do a run again."""

from __future__ import annotations

import shlex

import pytest
import yaml

from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import expand, read, value_text, words_of_file
from s2a_cli.config.settings import plain
from s2a_cli.config.words import command, words_of


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method=[side,bias]", "method.side.heads=8", "optim=sgd", "seed=3"],
        ["backbone=timm", "backbone.name=resnet34.a1_in1k", "quant=int8", "optim.lr=0.01", "dataset.scale=null"],
        ["dataset=folder", r'dataset.root="my photos/(a) \"b\", {c} $d=e"', 'dataset.hold_out="(\\d+)_"', "run_dir=x"],
        ["dataset=table", 'dataset.file="2024_01"', "dataset.class_columns=[a b,'null','7']", "dataset.separator=';'"],
        ["budget=2.5GiB"],
        ["budget=900MiB", "fidelity=0.999", "backbone=vit_s", "backbone.kwargs.drop_path_rate=0.1"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_words_compose_the_same_config(words):
    config = compose(words)
    again = words_of(config)
    assert again is not None
    assert shlex.split(command(again)) == ["s2a", "train", *again]
    config.run_dir = None
    assert plain(compose(again)) == plain(config)


def test_a_size_needs_no_quotes():
    assert "budget=900MiB" in command(words_of(compose(["budget=900MiB"])) or []).split()


def test_a_config_that_no_words_make_has_none():
    config = compose([])
    config.quant.name = "int3"
    assert words_of(config) is None


@pytest.mark.parametrize(
    "value",
    [
        *("photos", "photos, new (copy)", "été", "café", "a/b:c", "a:", "01", "1e3", "1.50", ".5", "on", "null", ""),
        *(r"(\d+)_", "a\\", 'say "a"', "it's", "~/x", "2024-01-01", 3, 0.5, None, True, ["a b", "7"], {3: {"a": "b"}}),
    ],
    ids=repr,
)
def test_a_value_is_written_as_hydra_and_yaml_read_it(value):
    assert read(f"backbone.kwargs.a={value_text(value)}").value() == value
    if value != "a\\":
        assert yaml.safe_load(value_text(value)) == value


@pytest.mark.parametrize("text", ["1e3", "1.50", "+1", "True", "nan", "été", "a=b", "~/x", "2024_01"])
def test_a_setting_that_is_a_text_takes_what_was_typed(text):
    for word in (f"dataset.root={text}", f"++dataset.root={text}"):
        assert compose([word]).dataset.root == text
    grid = expand([f"dataset.root={text},other"])
    assert [compose(words).dataset.root for words in grid] == [text, "other"]
    assert compose([f"dataset.class_columns=[a,{text}]"]).dataset.class_columns == ["a", text]


def test_texts_of_a_file_are_as_typed_and_other_values_those_of_yaml(tmp_path):
    lines = ["dataset.root: 2024-01-01", "run_dir: 0123", "optim.lr: 1e-3", "optim.epochs: 0x3", "dataset.domain: yes"]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    config = compose(words_of_file(tmp_path / "a.yaml")[:-1])
    assert words_of_file(tmp_path / "a.yaml")[-1] == 'dataset.domain="yes"'
    assert (config.dataset.root, config.run_dir, config.optim.lr, config.optim.epochs) == (
        "2024-01-01",
        "0123",
        1e-3,
        3,
    )
