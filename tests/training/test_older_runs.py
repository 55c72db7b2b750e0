"""Runs that version 0.1.0 made, with the names that tensors had then, are listed, tested and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from s2a_cli.cli.main import main

WORDS = [
    *("method=s2a", "method.prompt.rank=1", "method.prompt.lr_scale=1", "method.side.width=2", "method.side.heads=1"),
    *("dataset.fraction=0.2", "workers=0", "device=cpu", "optim.batch_size=16"),
]


@pytest.fixture
def older(tmp_path) -> Path:
    """A folder of a finished run and of one that was broken off in its third epoch of four."""
    return Path(shutil.copytree(Path(__file__).with_name("version_0_1_0"), tmp_path / "older"))


def test_an_older_run_is_listed(older, capsys):
    assert main(["table", str(older), "format=csv"]) == 0
    assert "s2a,int4" in capsys.readouterr().out


def test_an_older_run_is_figures_again(older, capsys):
    recorded = json.loads((older / "finished" / "result.json").read_text())["accuracy"]["test_top1"]
    main(["eval", f"run={older / 'finished'}", "workers=0"])
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test_top1"))
    assert float(said.split()[1]) == pytest.approx(recorded, abs=0.6)  # two images: other kernels round otherwise


def test_an_older_run_is_known_as_finished(older, capsys):
    assert main(["train", *WORDS, "optim.epochs=1", f"run_dir={older / 'finished'}"]) == 0
    assert "finished before" in capsys.readouterr().out


def test_an_older_run_goes_on(older, capsys):
    folder = older / "interrupted"
    assert main(["train", *WORDS, "optim.epochs=4", "seed=1", f"run_dir={folder}"]) == 0
    assert "going on in" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "ok" and result["accuracy"]["test_top1"] > 50
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
