"""Keys that a command does not take, and those that have no effect on it."""

from __future__ import annotations

import re

import pytest

from s2a_cli.cli.main import main
from s2a_cli.cli.options import OF_TRAINING, check_keys


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "imgaes=new"], "imgaes: no such word; s2a predict takes run=, images=, top=, .* 'images'"),
        (["predict", "images=new", "topp=3"], "topp: no such word; .* 'top'"),
        (["predict", "images=new", "deviec=cpu"], "'device'"),
        (["predict", "images=new", "optim.lr=3"], "optim.lr=3: has no effect on s2a predict; leave it out"),
        (["predict", "images=new", "dataset.root=x"], "dataset.root=x: has no effect on s2a predict"),
        (["export", "out=x", "imges=sub"], "imges: no such word; .* 'images'"),
        (["export", "out=x", "images=sub", "dataset.root=x"], "no effect on s2a export with images="),
        (["export", "out=x", "device=cuda"], "device=cuda: has no effect on s2a export; leave it out"),
        (["eval", "dat=sub"], "dat: no such word; .* 'data'"),
        (["eval", "optim.lr=1"], "optim.lr=1: has no effect on s2a eval; leave it out"),
        (["eval", "data=sub", "dataset.root=nope"], "dataset.root=nope: has no effect on s2a eval on other data"),
        (["report", "oot=x.html"], "oot: no such word; .* 'out'"),
    ],
)
def test_keys_are_judged_before_the_run_is_read(words, said, capsys):
    assert main([*words, "run=nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error)


def test_what_a_finished_run_reads_is_taken():
    check_keys("predict", ["run=x", "device=cpu", "workers=2", "optim.batch_size=8", "optim.micro_batch=4"], ["run"])
    check_keys("predict", ["backbone.checkpoint=a", "method.lr=1", "precision=bf16", "+seed=1"], ["run"], OF_TRAINING)
    check_keys("predict", ["optim.batch_size=8", "quant=int4"], ["run"], OF_TRAINING)
