"""What benchmarks/cuda/accept.py is made of: tasks that share a device, figures, decisions, plans."""

import threading
import time

import accept_plan
import accept_summary
import pytest
from accept_pool import Failed, Pool, Task
from fake_device import ABOUT, FakeWorker


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
        (entry(2852.0, 3300.0, 3400.0), 4, True, True),  # 3992 of 4096 are needed; 3900 are taken
        (entry(2852.0, 3700.0, 3800.0), 4, True, False),  # too bold
        (entry(3052.0, 3300.0, 3400.0), 4, False, True),  # too careful
        (entry(2852.0, 3500.0, 3700.0), 4, True, None),  # between what was allocated and what was reserved
        (entry(2852.0, 3500.0, 3700.0, capped={"4": False}), 4, True, False),
        (entry(2852.0, 3500.0, 3700.0), 6, True, True),
    ],
)
def test_decisions(found, gib, said, so):
    one = next(one for one in accept_summary.decisions([found], 500.0) if one["gib"] == gib)
    assert (one["said"], one["so"]) == (said, so) and one["near"] == (gib == 4)
    judged = accept_summary.judged([one])
    assert judged["too_bold"] == (["x in 4 GiB"] if said and so is False else [])
    assert judged["too_careful"] == (["x in 4 GiB"] if so and not said else [])
    assert judged["unknown"] == (["x in 4 GiB"] if so is None else [])


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
