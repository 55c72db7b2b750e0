"""The host's share of a training step: operators, launches, and how long the device has nothing to do."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rows import Batch, Made
from speed import synchronize
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli.common.text import first_line

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of PyTorch's traces
RUNTIME = ("cuda_runtime", "cuda_driver")
WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
)  # the host waits; at the end of a trace cudaDeviceSynchronize is ours
WARMUP, PROFILED = 3, 2  # steps
ENERGY_SECONDS = 1.0  # the counter moves every 20 to 100 ms


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, backward pass and update included."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().partition("::")[0]] += 1
        return func(*args, **(kwargs or {}))


def host_share(made: Made, host: Batch, steps: int) -> dict[str, Any]:
    """Of one step, in the median of `steps`.

    wall_ms: with the device waited for at both ends; issued_ms: until the host has issued it; operators: dispatched, of
    PyTorch and of ours. On CUDA device_ms: in which kernels or copies run; host_share: of the wall time the part in
    which none does; kernels; waits of the host for the device; joules of the device. These are None, and `problem` says
    why, where no trace can be had.
    """
    batch = host[0].to(made.device, made.step.dtype), host[1].to(made.device)
    made.compile()
    optimizer = made.optimizer()
    for _ in range(WARMUP):
        made(made.model, optimizer, *batch)
    wall, issued = [], []
    for _ in range(steps):
        synchronize(made.device)
        start = time.perf_counter()
        made(made.model, optimizer, *batch)
        issued.append(time.perf_counter() - start)
        synchronize(made.device)
        wall.append(time.perf_counter() - start)
    with Operators() as operators:
        made(made.model, optimizer, *batch)
    found = {"wall_ms": 1e3 * statistics.median(wall), "issued_ms": 1e3 * statistics.median(issued)}
    found |= {"operators": operators.count.total(), "own_operators": operators.count["s2a"]}
    found |= dict.fromkeys(("device_ms", "host_share", "kernels", "waits", "problem"))
    found["joules"] = joules(made, optimizer, batch)
    if made.device.type != "cuda":
        return found | {"problem": "a CPU has no other device to wait for"}
    try:
        found |= of_trace(traced(made, optimizer, batch), PROFILED)
    except Exception as error:  # counters that a container may not read
        return found | {"problem": f"no trace: {type(error).__name__}: {first_line(error)}"}
    if not found["kernels"]:
        return (
            found
            | dict.fromkeys(("device_ms", "kernels", "waits"))
            | {"problem": "the trace has no kernels: CUPTI can't be used here"}
        )
    return found | {"host_share": max(0.0, 1 - found["device_ms"] / found["wall_ms"])}


def joules(made: Made, optimizer: torch.optim.Optimizer, batch: Batch) -> float | None:
    """Energy of the device a step, idle power included, by NVML's counter; None where it can't be read."""
    if made.device.type != "cuda":
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports] (nvidia-ml-py)

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(made.device).uuid}")
        synchronize(made.device)
        begun, start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter()
        for count in itertools.count(1):
            made(made.model, optimizer, *batch)
            synchronize(made.device)
            if time.perf_counter() - start > ENERGY_SECONDS:
                return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - begun) / 1e3 / count
    except Exception:  # no package, no right to read, no such counter
        return None


def traced(made: Made, optimizer: torch.optim.Optimizer, batch: Batch) -> list[dict[str, Any]]:
    """The events of PyTorch's trace of some steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            made(made.model, optimizer, *batch)
        synchronize(made.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def of_trace(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds in which the device was busy, kernels, and waits of the host, a step."""
    spans, kernels, waits = [], 0, 0
    for event in events:
        category = str(event.get("cat", "")).lower()
        if category in DEVICE and "dur" in event:
            spans.append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
            kernels += category == "kernel"
        waits += category in RUNTIME and event.get("name") in WAITS
    return {"device_ms": covered(spans) / 1e3 / steps, "kernels": kernels / steps, "waits": waits / steps}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans: kernels of several streams run at once."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
