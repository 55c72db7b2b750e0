"""benchmarks/planner/budgets.py end to end on a CPU."""

from __future__ import annotations

import json

import budgets
import pytest

from s2a_cli.planner import measure, plan
from s2a_cli.planner.candidates import Candidate

SHALLOW = ["backbone=vit_micro", "backbone.kwargs.depth=2", "backbone.checkpoint=null", "backbone.pretrained=false"]


@pytest.mark.slow
def test_plans_stand_beside_all_rows_that_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "SECONDS", 0.2)
    monkeypatch.setattr(plan, "FINAL_SECONDS", 0.2)
    asked = ["device=cpu", "batch=4", "steps=1", "budgets=0.1MiB,1.6MiB,1GiB", f"out={tmp_path}", "name=small"]
    found = budgets.main([*SHALLOW, *asked])
    assert "0.1MiB: budget=0.1MiB: nothing fits" in capsys.readouterr().err
    assert found["rows"] == json.loads((tmp_path / "small.json").read_text())["rows"]
    assert [line["budget"] for line in found["budgets"]] == ["1.6MiB", "1GiB"]
    small, large = found["budgets"]
    assert small["peak_mib"] <= 1.6 and large["of_best"] > 0 and large["of_checkpointing"] > 0
    peaks = {row["name"]: row["peak_mib"] for row in found["rows"]}
    assert peaks["timm's checkpointing, the whole batch"] < peaks["stock, the whole batch"]
    assert f"| {large['best']} " in (tmp_path / "small.md").read_text()


def test_rows_are_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.2)
    monkeypatch.setattr(plan, "FINAL_SECONDS", 0.2)
    asked = [
        "device=cpu",
        "batch=4",
        "steps=1",
        "budgets=1GiB",
        f"out={tmp_path}",
        "rows=stock, micro-batches of [12]$",
    ]
    found = budgets.main([*SHALLOW, *asked])
    assert [row["name"] for row in found["rows"]] == ["stock, micro-batches of 1", "stock, micro-batches of 2"]
    assert found["budgets"][0]["checkpointing"] is None and found["budgets"][0]["of_best"] > 0


def test_a_plan_with_the_settings_of_a_row_is_that_row():
    words = [*SHALLOW, "method=bias", "device=cpu", "optim.batch_size=4"]
    planned = {
        micro: budgets.Row("", Candidate(micro).settings(4) | {"cuda_graphs": False}, "plan") for micro in (2, 4)
    }
    known = {row.name: row for row in budgets.rows(4)}
    assert known["stock, micro-batches of 2"].is_same(planned[2], words)
    assert known["stock, the whole batch"].is_same(planned[4], words)
    for other in (
        "stock, micro-batches of 1",
        "timm's checkpointing, micro-batches of 2",
        "quant=int4, micro-batches of 2",
    ):
        assert not known[other].is_same(planned[2], words)
