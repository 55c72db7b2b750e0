"""benchmarks/cuda/accept.py: end to end in its small form on a CPU, and its whole form with processes that only seem to
be there.
"""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "tiers"), str(ROOT / "benchmarks" / "cuda")]
import accept  # noqa: E402
import accept_page  # noqa: E402
import accept_plan  # noqa: E402
import accept_run  # noqa: E402
import accept_summary  # noqa: E402
from accept_pool import Failed, Pool, Task  # noqa: E402

from s2a_cli.common.errors import UserError  # noqa: E402

H100 = 81559.0  # MiB
ABOUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "total_mib": H100,
    "driver": "580.65.06",
    "rivals": None,
    "capability": "9.0",
    "cudnn": 91200,
}
ABOUT |= {
    "kernels": "triton 3.8.0",
    "cpu": "Xeon",
    "cores": 16,
    "cuda": "13.0",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "timm": "1.0.31",
}
ABOUT |= {"peft": "0.21.2", "python": "3.11.7"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The result and the page of the small form."""
    out = tmp_path_factory.mktemp("accept")
    command = [
        sys.executable,
        str(ROOT / "benchmarks/cuda/accept.py"),
        "--device",
        "cpu",
        "--tiny",
        f"out={out}",
        "name=small",
        "minutes=30",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in out.iterdir()} == {"small.json", "small.md", "small.log"}
    return json.loads((out / "small.json").read_text()) | {
        "page": (out / "small.md").read_text(),
        "progress": done.stderr,
    }


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_does_all_parts(small):
    assert small["dropped"] == small["not_predicted"] == small["not_started"] == [] and not accept_page.failures(small)
    pytest.importorskip("triton")
    assert small["summary"]["kernels"]["calls"] > 30
    assert max(small["summary"]["kernels"]["of_limit"].values()) <= 1
    [race] = small["speed"]
    assert all(row["images_per_second"] > 0 for row in race["rows"])
    host = {entry["row"]: entry for entry in small["host"]}
    assert (
        host["T2-int4"]["own_operators"] > 0 == host["bias"]["own_operators"]
        and host["T2-int4"]["operators"] > host["bias"]["operators"]
    )
    assert host["bias"]["wall_ms"] >= host["bias"]["issued_ms"] > 0


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_predicts_what_the_tracker_counts(small):
    done = [entry for entry in small["memory"] if not entry["refused"]]
    assert len(done) == len(small["memory"]) - 2 == 18  # full fine-tuning of a ResNet takes no pieces
    for entry in done:
        assert entry["measured"]["kind"] == "tracked-cpu"
        assert abs(accept_summary.error(entry)) < 0.001, entry["name"]


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_presents_nothing_as_cudas(small):
    page = small["page"]
    assert page.startswith("# Acceptance, small form on a CPU: no figure here is of a CUDA device\n")
    assert "max_memory_allocated" not in page and "peak, measured" not in page and "(measured" not in page
    assert "tracked on CPU tensors" in page and "## Speed: vit_micro, fp32, on a CPU, not CUDA" in page
    assert "tasks/min" in small["progress"] and " left" in small["progress"]


class FakeWorker:
    """Answers at once. trouble: {part of a task's name: what to raise, once for each that is listed}."""

    def __init__(self, trouble=None, seconds=0.0):
        self.trouble, self.seconds, self.asked, self.closed = trouble or {}, seconds, [], False

    def ask(self, task, seconds, told=lambda message: None):
        ask = task.ask
        if ask["kind"] == "about":
            return ABOUT
        self.asked.append(task.name)
        time.sleep(self.seconds)
        for part, errors in self.trouble.items():
            if part in task.name and errors:
                raise errors.pop(0)
        return getattr(self, f"_{ask['kind']}")(ask, told)

    def _predict(self, ask, told):
        peak = {"none": 8000.0, "tiny": 600.0}.get(ask.get("quant"), 1000.0)
        return {
            "peak_mib": peak,
            "static_mib": 300.0,
            "kept_mib": 500.0,
            "expected_mib": peak + 32,
            "expected_reserved_mib": peak * 1.1,
        }

    def _measure(self, ask, told):
        peak = self._predict(ask, told)["expected_mib"]
        return {
            "kind": "measured-cuda",
            "peak_mib": peak,
            "static_mib": 300.0,
            "kept_mib": 500.0,
            "reserved_mib": 1.2 * peak,
        } | {"fitting_peak_mib": peak, "left_mib": 0.0, "held_mib": 32.0}

    def _capped(self, ask, told):
        return {"fits": True}

    def _kernels(self, ask, told):
        return {
            "worst": {"activate": 0.01},
            "of_limit": {"activate": 0.5},
            "calls": {"activate": 3},
            "without": {},
            "left_to_plain": {},
        }

    def _compile(self, ask, told):
        return {"seconds": 50.0}

    def _host(self, ask, told):
        figures = {
            "wall_ms": 40.0,
            "issued_ms": 30.0,
            "device_ms": 20.0,
            "host_share": 0.5,
            "kernels": 800.0,
            "waits": 0.0,
        }
        return figures | {"operators": 1000, "own_operators": 100, "problem": None, "context_mib": 500.0}

    def _speed(self, ask, told):
        for row in ask["rows"]:
            for seconds in (None, 0.1, 0.1, 0.1):
                told({"row": row, "seconds": seconds})
            if self.trouble.get(f"row {row}"):
                raise self.trouble[f"row {row}"].pop()
        rows = [
            {"name": row, "seconds": [0.1] * 3, "images_per_second": 640.0, "beside_mib": 1100.0, "problems": {}}
            for row in ask["rows"]
        ]
        return {"rows": rows, "context_mib": 550.0}

    def text(self):
        return "a log"

    def close(self):
        self.closed = True


HEAD = {
    "command": "python benchmarks/cuda/accept.py",
    "date": "2026-11-25T21:00+00:00",
    "commit": "abc",
    "small": False,
    "cuda": True,
}
HEAD |= {"minutes": 8.0, "environment": ABOUT}


def whole(monkeypatch, trouble=None, seconds=480.0, each=0.0, size=3):
    """The result and the page of the whole form on a device that only seems to be there."""
    workers = []

    def start():
        workers.append(FakeWorker(trouble, each))
        return workers[-1]

    monkeypatch.setattr(accept_run, "processes", lambda *_: (size, 1))
    plan = accept_plan.Plan.of("cuda", False, H100, None)
    pool, predictors = Pool(start, 1), Pool(FakeWorker, 1)
    pool.ready(5)
    run = accept_run.Run(plan, HEAD, pool, predictors, time.monotonic(), seconds, lambda run: None)
    run()
    result = run.result()
    return json.loads(json.dumps(accept.finite(result))), accept_page.markdown(result), workers


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
    assert all(f"- {name}\n" in page for name in names[len(done) : -1])
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
        (["--tiny", "minute=3"], "minute=3: expected one of minutes=..., batch=..., out=..., name=..."),
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


# Tasks


def test_tasks_share_the_memory_of_a_device():
    running, most, lock = [], [], threading.Lock()

    class Slow(FakeWorker):
        def ask(self, task, seconds, told=None):
            if task.ask["kind"] == "about":
                return ABOUT
            with lock:
                running.append(task.ask["needs"])
                most.append(sum(running))
            time.sleep(0.02)
            with lock:
                running.remove(task.ask["needs"])
            return 1

    tasks = [Task(str(n), {"kind": "x", "needs": needs}) for n, needs in enumerate((3, 3, 3, 9, 1, 2, 3, 1))]
    Pool(Slow, 3, room_mib=6).run(tasks, time.monotonic() + 30, needs=lambda task: task.ask["needs"])
    assert (
        all(task.result for task in tasks) and max(x for x in most if x != 9) <= 6 and most.count(9) == 1
    )  # what is too large runs alone


def test_processes_that_always_end_are_not_started_for_ever():
    died = [Failed("ended", ends=True)] * 1000
    pool = Pool(lambda: FakeWorker({"task": list(died)}), 1)
    tasks = [Task(f"task {n}", {"kind": "x"}) for n in range(50)]
    pool.run(tasks, time.monotonic() + 30)
    assert (
        sum(task.problem == "ended" for task in tasks) == 13 and "13 processes were started, and ended" in pool.problems
    )


# Figures


def entry(predicted, peak, reserved, **more):
    measured = {"peak_mib": peak, "reserved_mib": reserved}
    return {"name": "x", "predicted": {"peak_mib": predicted}, "measured": measured} | more


def test_errors():
    entries = [
        entry(110.0, 100.0, 1),
        entry(90.0, 100.0, 1) | {"name": "y"},
        entry(104.0, 100.0, 1),
        entry(100.0, None, 1),
    ]
    found = accept_summary.errors(entries, "peak_mib", "peak_mib")
    assert found["count"] == 3 and found["median"] == pytest.approx(0.10) and found["bias"] == pytest.approx(0.04)
    assert abs(found["worst"]) == pytest.approx(0.10) and accept_summary.errors(entries, "kept_mib", "kept_mib") is None


@pytest.mark.parametrize(
    "found, gib, said, so",
    [
        (entry(3200.0, 3300.0, 3400.0), 4, True, True),  # 3992 of 4096 are needed; 3900 are taken
        (entry(3200.0, 3700.0, 3800.0), 4, True, False),  # too bold
        (entry(3400.0, 3300.0, 3400.0), 4, False, True),  # too careful
        (entry(3200.0, 3500.0, 3700.0), 4, True, None),  # between what was allocated and what was reserved
        (entry(3200.0, 3500.0, 3700.0, capped={"4": False}), 4, True, False),
        (entry(3200.0, 3500.0, 3700.0), 6, True, True),
    ],
)
def test_decisions(found, gib, said, so):
    one = next(one for one in accept_summary.decisions([found], 500.0) if one["gib"] == gib)
    assert (one["said"], one["so"]) == (said, so) and one["near"] == (gib == 4)
    judged = accept_summary.judged([one])
    assert judged["too_bold"] == (["x in 4 GiB"] if said and so is False else [])
    assert judged["too_careful"] == (["x in 4 GiB"] if so and not said else [])
    assert judged["unknown"] == (["x in 4 GiB"] if so is None else [])


def test_decisions_between_are_tried_out(monkeypatch):
    monkeypatch.setattr(
        FakeWorker, "_predict", lambda self, ask, told: {"peak_mib": 3200.0, "expected_reserved_mib": 3232.0}
    )
    monkeypatch.setattr(FakeWorker, "_measure", lambda self, ask, told: {"peak_mib": 3400.0, "reserved_mib": 3800.0})
    monkeypatch.setattr(FakeWorker, "_capped", lambda self, ask, told: {"fits": ask["limit_mib"] != 4096 - 550.0})
    result, page, _ = whole(monkeypatch)
    fits = result["summary"]["fits"]
    assert len(fits["too_bold"]) == accept_run.CAPPED and len(fits["unknown"]) == 240 - accept_run.CAPPED
    assert "24 too bold" in page


def test_rows_that_fit_a_device_together():
    predicted = {
        name: {"static_mib": 100.0, "peak_mib": 100.0 + step}
        for name, step in (("full", 500.0), ("bias", 50.0), ("T3", 10.0))
    }
    rows = ["bias-budget0.3", "full", "bias", "T3"]
    assert accept_plan.fitting(rows, predicted, 900.0) == (rows, [])
    assert accept_plan.fitting(rows, predicted, 800.0) == (rows[:3], ["T3"])
    assert accept_plan.fitting(rows, predicted, 400.0) == (["bias-budget0.3", "bias", "T3"], ["full"])


def test_a_batch_for_the_device():
    assert [accept_plan.Plan.of("cuda", False, gib * 1024.0, None).batch for gib in (80, 24, 16, 8)] == [64, 64, 32, 16]
    assert accept_plan.Plan.of("cuda", False, 8192.0, 4).batch == 4
