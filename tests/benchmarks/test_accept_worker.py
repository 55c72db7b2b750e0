"""The processes of benchmarks/cuda/accept.py: what they answer on a device that only seems to be CUDA."""

import os
import re
import sys
from types import SimpleNamespace

import accept
import accept_host
import accept_machine
import accept_plan
import accept_worker
import kernel_check
import pytest
import rows
import speed
import torch
from accept_pool import Failed, Task, Worker

from s2a_cli.common.errors import UserError
from s2a_cli.memory import device as busy

ECHO = """
import json, sys, time
print("a library says hello")
for line in sys.stdin:
    ask = json.loads(line)
    if ask["kind"] == "dies":
        print("a last word", file=sys.stderr, flush=True)
        sys.exit(7)
    if ask["kind"] == "hangs":
        time.sleep(60)
    if ask["kind"] == "tells":
        print(json.dumps({"told": 1}), flush=True)
    print(json.dumps({"failed": "no", "refused": True} if ask["kind"] == "fails" else {"done": 5}), flush=True)
"""


@pytest.fixture
def echo():
    worker = Worker("cpu", dict(os.environ), (sys.executable, "-c", ECHO))
    yield worker
    worker.close()


def test_a_worker_answers(echo):
    heard = []
    assert echo.ask(Task("", {"kind": "tells"}), 30, heard.append) == 5 and heard == [1]
    with pytest.raises(Failed, match="no") as error:
        echo.ask(Task("", {"kind": "fails"}), 30)
    assert error.value.refused and not error.value.ends
    with pytest.raises(Failed, match="its process ended with code 7: a last word") as error:
        echo.ask(Task("", {"kind": "dies"}), 30)
    assert error.value.ends
    with pytest.raises(Failed, match="its process ended with code 7"):
        echo.ask(Task("", {"kind": "tells"}), 30)


@pytest.mark.parametrize("limit, silence, said", [(0.2, 60, "took more than 0 s"), (60, 0.2, "said nothing for 0 s")])
def test_a_worker_that_hangs_is_ended(echo, limit, silence, said):
    with pytest.raises(Failed, match=said) as error:
        echo.ask(Task("", {"kind": "hangs"}, silence=silence), limit)
    assert error.value.ends and echo.process.poll() is not None


class Seems(str):
    """A device that is the CPU to PyTorch, and CUDA to whoever asks for its type."""

    type = "cuda"


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for torch.cuda with counters that grow; returns what was called."""
    calls, device = [], Seems("cpu")

    def counter(*_):
        calls.append("asked")
        return len(calls) * 2**20

    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, counter)
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: calls.append((name, *args)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    )

    class OnCpu(rows.Made):
        def __init__(self, row, words, _, **kwargs):
            super().__init__(row, words, torch.device("cpu"), **kwargs)
            self.device = device

    monkeypatch.setattr(accept_worker, "Made", OnCpu)
    monkeypatch.setattr(speed, "Made", OnCpu)
    return SimpleNamespace(device=device, calls=calls)


WORDS = [*accept_plan.SMALL["vit_micro"], "precision=fp32", "optim.batch_size=2"]
ASK = {"words": WORDS, "batch": 2, "method": "bias", "quant": "int4"}


def test_a_worker_measures_steady_steps_and_one_that_fits_codes(cuda):
    found = accept_worker.measure(ASK, cuda.device, None)
    resets = cuda.calls.count(("reset_peak_memory_stats", cuda.device))
    assert found["kind"] == "measured-cuda" and resets == accept_worker.STEADY + 1
    assert found["left_mib"] == 1 < found["static_mib"] < found["peak_mib"] < found["fitting_peak_mib"]
    assert found["held_mib"] > 0 and found["reserved_mib"] > found["peak_mib"]


def test_a_workers_device_has_a_number(monkeypatch):
    monkeypatch.setattr(accept_worker, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert (accept_worker.chosen("cuda"), accept_worker.chosen("cpu")) == (torch.device("cuda:0"), torch.device("cpu"))


def test_a_worker_tries_a_smaller_allocator(cuda, monkeypatch):
    ask = ASK | {"limit_mib": 20 * 1024.0}
    assert accept_worker.capped(ask, cuda.device, None) == {"fits": True}

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(accept_worker, "measure", full)
    assert accept_worker.capped(ask, cuda.device, None) == {"fits": False}
    limits = [call[1] for call in cuda.calls if call[0] == "set_per_process_memory_fraction"]
    assert limits == [0.25, 1.0] * 2  # and the whole again


def test_a_worker_times_rows_side_by_side(cuda):
    told = []
    ask = {"words": WORDS, "batch": 2, "rows": ["full", "bias"], "steps": 2, "seconds": 60}
    found = accept_worker.speed(ask, cuda.device, told.append)
    assert [row["name"] for row in found["rows"]] == ["full", "bias"] and all(
        len(row["seconds"]) == 2 for row in found["rows"]
    )
    assert all(row["beside_mib"] > 0 and not row["problems"] for row in found["rows"])
    assert [m["row"] for m in told if m["seconds"] is None][:2] == ["full", "bias"] and sum(
        m["seconds"] is not None for m in told
    ) == 4


def test_rows_for_which_no_time_is_left_say_so(cuda):
    found = accept_worker.speed(
        {"words": WORDS, "batch": 2, "rows": ["full", "bias"], "steps": 2, "seconds": -1}, cuda.device, lambda m: None
    )
    assert [row["problems"] for row in found["rows"]] == [{"speed": "no time was left"}] * 2


@pytest.mark.parametrize(
    "trace, problem",
    [("kernels", None), ("empty", "CUPTI can't be used here"), ("fails", "no trace: RuntimeError: not permitted")],
)
def test_a_worker_tells_the_hosts_share(cuda, monkeypatch, trace, problem):
    def traced(*_):
        if trace == "fails":
            raise RuntimeError("not permitted")
        return [{"cat": "kernel", "ts": 0, "dur": 1.0}] if trace == "kernels" else []

    monkeypatch.setattr(accept_host, "traced", traced)
    found = accept_worker.host(ASK | {"steps": 2}, cuda.device, None)
    assert found["context_mib"] < 2**14 and found["operators"] > 100 and found["own_operators"] > 0
    assert (found["host_share"] is None) == (found["kernels"] is None) == bool(problem)
    assert (problem or "") in (found["problem"] or "") and (problem or found["host_share"] > 0.9)


def test_plain_operators_are_not_compared_with_themselves(cuda, monkeypatch):
    from s2a_cli.activations import kernels

    monkeypatch.setattr(kernels, "available", lambda: "plain (Triton: ImportError)")
    with pytest.raises(
        UserError, match=re.escape("no kernel runs here, so none was compared: plain (Triton: ImportError)")
    ):
        accept_worker.check_kernels(ASK, cuda.device, None)


def test_what_goes_wrong_in_a_worker_is_its_answer(cuda, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setitem(accept_worker.KINDS, "measure", fails)
    answer = accept_worker.answered({"kind": "measure"}, cuda.device, None)
    assert answer == {"failed": "RuntimeError: CUDA error: out of memory", "out_of_memory": True}
    refused = accept_worker.answered(
        {"kind": "predict", "words": WORDS, "method": "bias", "quant": "nothing"}, cuda.device, None
    )
    assert refused["refused"] and "nothing" in refused["failed"]


def test_what_a_trace_tells():
    def event(category, start, length, name="x"):
        return {"cat": category, "ts": start, "dur": length, "name": name}

    events = [
        event("kernel", 0, 1000),
        event("Kernel", 500, 1500),
        event("gpu_memcpy", 5000, 1000),
        event("gpu_user_annotation", 0, 9000),
    ]
    events += [
        event("cuda_runtime", 0, 9, "cudaStreamSynchronize"),
        event("cuda_runtime", 0, 9, "cudaDeviceSynchronize"),
        {"ph": "M"},
    ]
    assert accept_host.of_trace(events, 2) == {"device_ms": 1.5, "kernels": 1.0, "waits": 0.5}


def test_what_a_container_has(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(str(8 * 2**30))
    (tmp_path / "memory.current").write_text(str(2 * 2**30))
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable: 33554432 kB\n")
    assert accept_machine.cores(tmp_path) == 1
    assert accept_machine.host_gib(tmp_path, tmp_path / "meminfo") == 6
    assert accept_machine.host_gib(tmp_path / "none", tmp_path / "meminfo") == 32
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert accept_machine.cores(tmp_path) == accept_machine.cores(tmp_path / "none") >= 1


@pytest.mark.parametrize(
    "total, cores, host, expected",
    [
        (81559.0, 16, 128.0, (4, 8)),
        (143156.0, 16, 124.0, (7, 8)),
        (24576.0, 8, 32.0, (1, 7)),
        (81559.0, 4, 16.0, (2, 2)),
        (81559.0, 2, 4.0, (1, 1)),
        (None, 64, 64.0, (1, 1)),
    ],
)
def test_processes(total, cores, host, expected):
    assert accept_machine.processes(total, cores, host) == expected


def test_environments_of_workers(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cuda, cpu = accept.environ("cuda"), accept.environ("cpu")
    assert (
        "PYTORCH_CUDA_ALLOC_CONF" not in cuda
        and cuda["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        and "TRITON_INTERPRET" not in cuda
    )
    assert cpu["CUDA_VISIBLE_DEVICES"] == "" and cpu["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize(
    "lines, expected",
    [(["580.65.06"], "580.65.06"), (["warning: x", " 535.104 "], "535.104"), (["[N/A]"], None), (None, None)],
)
def test_the_driver(monkeypatch, lines, expected):
    monkeypatch.setattr(busy, "_smi", lambda device, query: lines)
    assert busy.driver(torch.device("cuda")) == expected


def test_gaps_that_no_rounding_explains():
    a = torch.tensor([1.0, 2.0])
    assert kernel_check.gap(a, torch.tensor([1.0, 4.0])) == 0.5 and kernel_check.gap(a, a) == 0
    assert kernel_check.gap(a, torch.tensor([1.0, float("nan")])) == kernel_check.gap(a, a[:1]) == float("inf")
    assert kernel_check.gap(torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 3], dtype=torch.uint8)) == 0.5
