"""A device that only seems to be there: workers of benchmarks/cuda/accept.py that answer at once."""

import json
import time

import accept
import accept_page
import accept_plan
import accept_run
from accept_pool import Pool

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


class FakeWorker:
    """A worker that answers at once.

    trouble: {part of a task's name: what to raise, once for each that is listed}.
    """

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
    """Returns the result, the page and the workers of the whole form, on a device that only seems to be there."""
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
