"""The whole form of benchmarks/cuda/accept.py, with processes that only seem to be there, and its command line."""

import json
import re
import time

import accept
import accept_page
import accept_plan
import accept_run
import pytest
import torch
from accept_pool import Failed
from fake_device import H100, FakeWorker, whole

from s2a_cli.common.errors import UserError


def test_the_whole_form_has_all_combinations(monkeypatch):
    result, page, _ = whole(monkeypatch)
    assert len(result["memory"]) == 5 * 6 * 4 * 2 and all(entry["measured"] for entry in result["memory"])
    assert {entry["batch"] for entry in result["memory"]} == {64}
    assert result["dropped"] == [] and not accept_page.failures(result)
    assert [race["name"] for race in result["speed"]] == [
        f"speed {' '.join(race)}" for race in accept_plan.Plan("cuda", 64).races
    ]
    rows = {row["name"] for row in result["speed"][0]["rows"] if row["images_per_second"]}
    assert rows == set(accept_plan.Plan("cuda", 64).rows) >= {"full-ckpt", "bias-micro2", "bias-budget0.3", "T3"}
    assert page.startswith("# Acceptance on NVIDIA H100 80GB HBM3\n") and "driver 580.65.06" in page
    assert "- Predicted against measured, peak: median error 3.1%, with its sign -3.1 %; worst -5.1 %" in page
    assert "| s2a, tiny | 632 (-5.1 %) |" in page and "640.0 (1.00x) | 3 | ~1,000 | 1,100 (1.0x) |" in page
    assert "| vit_b bf16 | `T3` | 40.0 | 30.0 | 20.0 | 50% | 800 | 0 | 1,000 | 100 |" in page


def test_the_compilers_rows_are_timed_only_where_they_were_compiled(monkeypatch):
    result, page, _ = whole(monkeypatch, {"compile vit_b bf16 bias-budget0.1": [Failed("no compiler")]})
    race = {row["name"]: row for row in result["speed"][0]["rows"]}
    assert (
        race["bias-budget0.1"]["problems"] == {"speed": "no compiler"} and race["bias-budget0.3"]["images_per_second"]
    )
    assert "compile vit_b bf16 bias-budget0.1: no compiler" in page


def test_what_fails_stands_on_the_page_and_stops_nothing(monkeypatch):
    died, oom = (
        Failed("its process ended with code -11", ends=True),
        Failed("OutOfMemoryError: 3 GiB", out_of_memory=True),
    )
    name = "memory swin_b fp32 full none"
    result, page, workers = whole(monkeypatch, {"memory vit_b bf16 bias int4": [died], name: [oom]}, size=3)
    by_name = {entry["name"]: entry for entry in result["memory"]}
    assert by_name["memory vit_b bf16 bias int4"]["problems"] == {"measured": "its process ended with code -11"}
    assert sum(entry["measured"] is None for entry in result["memory"]) <= 2
    asked = [name for worker in workers for name in worker.asked]
    assert asked.count(name) == (2 if by_name[name]["measured"] else 1)  # again, alone, where others ran beside it
    assert "- memory vit_b bf16 bias int4, measured: its process ended with code -11" in page and "~1,000" in page


def test_a_row_that_ends_the_process_is_left_out_of_the_next_attempt(monkeypatch):
    result, page, _ = whole(monkeypatch, {"row T3": [Failed("said nothing for 90 s, and was ended", ends=True)]})
    race = {row["name"]: row for row in result["speed"][0]["rows"]}
    assert "said nothing for 90 s" in race["T3"]["problems"]["speed"] and not race["T3"].get("images_per_second")
    assert all(row.get("images_per_second") for name, row in race.items() if name != "T3")
    assert "speed vit_b bf16 T3: ended the process of all rows: said nothing for 90 s" in page


def test_without_time_the_least_important_are_dropped_and_named(monkeypatch):
    result, page, _ = whole(monkeypatch, seconds=2.0, each=0.02, size=1)
    done = [entry for entry in result["memory"] if entry["measured"]]
    plan = accept_plan.Plan.of("cuda", False, H100, None)
    names = [task.name for task in plan.measures()]
    assert [entry["name"] for entry in done] == names[: len(done)] and len(done) < len(
        names
    )  # in the order of importance
    assert (
        set(names[len(done) :]) <= set(result["dropped"])
        and result["speed"]
        and "speed vit_b tf32" in result["dropped"]
    )
    memories = sum(name.startswith("memory") for name in result["dropped"])
    assert f"- memory: {memories}" in page or memories <= accept_page.LISTED
    assert not accept_page.failures(result)  # cut off is not failed


def test_what_is_timed_does_not_wait_long_for_predictions(monkeypatch):
    monkeypatch.setattr(accept_run, "PREDICT_SECONDS", 0.0)
    slow = FakeWorker._predict

    def predict(self, ask, told):
        time.sleep(0.002 if self.closed or "method" in ask else 0.05)
        return slow(self, ask, told)

    monkeypatch.setattr(FakeWorker, "_predict", predict)
    result, _, _ = whole(monkeypatch)
    assert (
        not result["speed"][0]["rows"][-1]["predicted"]
        and result["not_predicted"] == []
        and not accept_page.failures(result)
    )


def test_a_device_that_no_process_starts_on(monkeypatch, tmp_path):
    class Broken(FakeWorker):
        def ask(self, *args):
            raise Failed("all CUDA-capable devices are busy", ends=True)

    monkeypatch.setattr(accept, "Worker", lambda *_: Broken())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cuda: all CUDA-capable devices are busy"):
        accept.accept([f"out={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_off_run_leaves_its_files(monkeypatch, tmp_path):
    monkeypatch.setattr(accept, "Worker", lambda *_: FakeWorker())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def stopped(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(accept_run.Run, "_race", stopped)
    for name in ("nvidia_h100_80gb_hbm3", "nvidia_h100_80gb_hbm3-2"):  # the first result stays
        path = accept.accept([f"out={tmp_path}"])
        assert path.name == f"{name}.md" and "**Broken off by hand.**" in path.read_text()
        result = json.loads(path.with_suffix(".json").read_text())
        assert all(entry["measured"] for entry in result["memory"]) and "speed vit_b bf16" in result["dropped"]


def test_a_page_that_fails_loses_no_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(accept, "Worker", lambda *_: FakeWorker())
    monkeypatch.setattr(accept, "markdown", lambda result: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = accept.accept([f"out={tmp_path}", "name=x"])
    assert (
        "ZeroDivisionError" in path.read_text()
        and json.loads((tmp_path / "x.json").read_text())["memory"][0]["measured"]
    )


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--tiny", "minute=3"], "minute=3: expected one of minutes=..., batch=..., out=..., name=..., only=..."),
        (["only=speed"], "only=speed: expected only=memory"),
        (["minutes=no"], "minutes=no: expected a number"),
        (["minutes=nan"], "minutes=nan: expected a number above 0"),
        (["--device", "cpu", "--tiny", "batch=0"], "batch=0: expected a number above 0"),
    ],
)
def test_bad_words(argv, said):
    with pytest.raises(UserError, match=re.escape(said)):
        accept.arguments(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device():
    with pytest.raises(UserError, match="finds no CUDA device here; --device cpu --tiny runs the small form"):
        accept.arguments([])


def test_decisions_between_are_tried_out(monkeypatch):
    monkeypatch.setattr(
        FakeWorker, "_predict", lambda self, ask, told: {"peak_mib": 2852.0, "expected_reserved_mib": 2884.0}
    )
    monkeypatch.setattr(FakeWorker, "_measure", lambda self, ask, told: {"peak_mib": 3400.0, "reserved_mib": 3800.0})
    monkeypatch.setattr(FakeWorker, "_capped", lambda self, ask, told: {"fits": ask["limit_mib"] != 4096 - 550.0})
    result, page, _ = whole(monkeypatch)
    fits = result["summary"]["fits"]
    assert len(fits["too_bold"]) == accept_run.CAPPED and len(fits["unknown"]) == 240 - accept_run.CAPPED
    assert "24 too bold" in page
