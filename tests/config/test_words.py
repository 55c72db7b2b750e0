"""The words that do a run again."""

from __future__ import annotations

import shlex

import pytest

from s2a_cli.config.compose import compose
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
