"""The tables of benchmarks/structures: those in the repository are of today's structures, and say what was found."""

from __future__ import annotations

import csv
import json
import math

import compare_report
import compare_structures
import pytest
import structures

from s2a_cli.methods import STRUCTURES

OURS = ("bias", "full", "linear", "prompt", "side", "s2a", "peft")  # nothing public to compare with


def entry(tops: list[float], **changes) -> dict:
    """What is stored of a contender."""
    test = {"photos": tops, "sketches": [top - 10 for top in tops]}
    return {"words": ["method=[x]", "optim.lr=0.004"], "test": test, "peaks": {"none": 5000.0, "tiny": 700.0}} | changes


def test_every_structure_is_in_the_table_with_what_it_was_compared_with():
    figures = json.loads(structures.FIGURES.read_text())
    assert figures.keys() == STRUCTURES.keys()
    with structures.REFERENCES.open(newline="") as file:
        compared = {row["structure"] for row in csv.DictReader(file)}
    assert compared == STRUCTURES.keys() - set(OURS)
    page = structures.PAGE.read_text()
    assert all(f"| `{name}` |" in page for name in STRUCTURES)


def test_differences_are_paired_and_costs_may_be_missing(tmp_path):
    entries = {
        "s2a": entry([80.0, 82.0, 84.0], percent=0.86),
        "bias": entry([79.0, 81.0, 83.0]),
        "full": entry([70.0, 81.0, 90.0], peaks={"none": 8315.0, "tiny": None}),
    }
    table = compare_report.rows(entries)
    assert list(table.index) == ["s2a", "bias", "full"]
    assert table.loc["bias", "mean"] == pytest.approx(76.0) and table.loc["bias", "std"] == pytest.approx(2.0)
    assert table.loc["bias", "- s2a"] == "-1.0 ± 0.0" and table.loc["full", "- s2a"].startswith("-1.7 ± ")
    assert table.loc["bias", "p"] < 0.1 < table.loc["full", "p"]
    assert table.loc["bias", "setting"] == "lr=0.004" and math.isnan(table.loc["full", "tiny MiB"])
    compare_report.report(entries, tmp_path, "vit_b")
    assert "| 8,315" in (tmp_path / "table.md").read_text() and (tmp_path / "structures.png").stat().st_size > 1000


def test_the_last_epoch_stands_beside_and_peaks_may_be_missing(tmp_path):
    entries = {
        "s2a": entry([80.0], last={"photos": [90.0], "sketches": [70.0]}, peaks={}),
        "bias": entry([79.0], peaks={"none": None}),
    }
    table = compare_report.rows(entries)
    assert table.loc["s2a", "val., last epoch"] == 80.0 and math.isnan(table.loc["bias", "val., last epoch"])
    compare_report.report(entries, tmp_path, "vit_b")
    assert "| 80.0" in (tmp_path / "table.md").read_text()


class Pool:
    """Runs nothing: a learning rate of 0.004 is the best, and the last epoch 5 points below."""

    def __init__(self):
        self.lines: list[list[str]] = []

    def map(self, run, lines):
        self.lines += lines
        for words in lines:
            top = 80.0 if "optim.lr=0.004" in words else 70.0
            yield {"val_top1": top, "test_top1": top + float(words[1][-1]), "last": top - 5}


def test_a_search_has_a_split_for_each_seed_and_reads_no_test_split(tmp_path):
    datas, pool = [compare_structures.Data(f"{name},optim.epochs=2") for name in ("photos", "more")], Pool()
    search = compare_structures.Search(pool, "bias", ["method=bias"], datas, [0, 3], tmp_path)
    best, scores = search.chosen()
    assert best == ["optim.lr=0.004"] and scores == {"0.001": 70.0, "0.002": 70.0, "0.004": 80.0, "0.008": 70.0}
    assert len(pool.lines) == 4 * 2 * 2 and all("test=false" in words for words in pool.lines)
    assert sum("seed=3" in words and "dataset.split_seed=3" in words for words in pool.lines) == 8
    assert len({words[-1] for words in pool.lines}) == len(pool.lines)  # a folder each
    pool.lines.clear()
    found = compare_structures.tested(pool, "bias", ["method=bias"], datas, [0, 3], tmp_path)
    assert found == {
        "test": {"photos": [70.0, 73.0], "more": [70.0, 73.0]},
        "last": {"photos": [65.0] * 2, "more": [65.0] * 2},
    }
    assert not any("test=false" in words for words in pool.lines)


def test_contenders_are_lists_of_structures():
    assert compare_structures.words_of("lora+side") == ["method=[lora,side]"]
    assert compare_structures.rates_of("full+side") == compare_structures.SMALL
    names = [*compare_structures.CONTENDERS, *compare_structures.KNOBS]
    assert {one for name in names for one in name.split("+")} <= STRUCTURES.keys()
