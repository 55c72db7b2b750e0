"""A process of accept.py that is asked: a question a line on stdin, answers a line on the stdout it was started with.

    python benchmarks/cuda/accept_worker.py cuda|cpu

A question is JSON: `kind`, one of `KINDS`, and its arguments. While it is worked on, lines {"told": ...} may come; the
last is {"done": result} or {"failed": reason}. Whatever else is printed goes to stderr. After an error that leaves the
CUDA context unusable the process ends; accept.py starts another.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tiers"), str(Path(__file__).parents[2])]

import torch
from accept_host import host_share
from kernel_check import check_row
from rows import BY_NAME, Batch, Made, Row, blank, noise, predicted, take_steps
from speed import time_rows
from tiers import environment

from s2a_cli import memory
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line
from s2a_cli.memory import device as busy
from s2a_cli.memory.allocator import is_expandable
from s2a_cli.memory.cuda import differences
from s2a_cli.memory.result import MIB
from s2a_cli.training.run import OUT_OF_MEMORY, choose_device

# Codes are fitted in a layer's forward passes 0, 1, 4 and 16: steps 2 and 3 are steady, step 4 is not.
WARMUP, STEADY = 2, 2
Told = Callable[[Any], None]
Answer = dict[str, Any]


def row_of(ask: Answer) -> Row:
    return (
        BY_NAME[ask["row"]]
        if "row" in ask
        else Row("combination", "", (f"method={ask['method']}", f"quant={ask['quant']}"))
    )


def about(ask: Answer, device: torch.device, told: Told) -> Answer:
    """The machine, as far as it bears on figures; whether others compute on the device."""
    found = environment(device) | {"total_mib": None, "driver": None, "rivals": None, "capability": None, "cudnn": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability, cudnn = f"{properties.major}.{properties.minor}", torch.backends.cudnn.version()
        found |= {"total_mib": properties.total_memory / MIB, "capability": capability, "cudnn": cudnn}
        found |= {"driver": busy.driver(device), "rivals": busy.rivals(device)}
    return found


def predict(ask: Answer, device: torch.device, told: Told) -> Answer:
    """MiB of a step, predicted; those that are `expected` have what CUDA is thought to add, bounds apart."""
    row = row_of(ask)
    if row.offload or row.graph or row.budget is not None:
        found = predicted(row, ask["words"], ask["batch"])
        return {"peak_mib": found.peak_mib, "static_mib": found.static_mib, "kept_mib": found.kept_mib}
    made = Made(row, ask["words"], torch.device("cpu"), meta=True)
    size = made.backbone.image.size
    images = (
        torch.empty(ask["batch"], 3, size, size, dtype=made.step.dtype),
        torch.empty(ask["batch"], dtype=torch.int64),
    )
    profile = memory.profile(made.model, images, made, made.optimizer)
    found, more = profile.memory, sum(d.mib for d in differences(profile.calls) if not d.is_bound)
    return {
        "peak_mib": found.peak_mib,
        "static_mib": found.static_mib,
        "kept_mib": found.kept_mib,
        "expected_mib": found.peak_mib + more,
        "reserved_mib": (taken := profile.reserved_bytes(is_expandable()) / MIB),
        "expected_reserved_mib": taken + more,
    }


def measure(ask: Answer, device: torch.device, told: Told) -> Answer:
    """MiB of steady steps as the device's allocator counts them; on a CPU as our tracker counts real tensors.

    left_mib: what was allocated before the row's own; held_mib: after it is gone, the workspaces of cuBLAS.
    fitting_peak_mib: of a step in which codes are fitted.
    """
    left = allocated(device)
    made = Made(row_of(ask), ask["words"], device)
    host = noise(made.backbone.image.size, ask["batch"])
    if device.type == "cpu":
        return tracked(made, host)
    optimizer, steady, fitting = made.optimizer(), memory.CudaMeter(device, WARMUP), memory.CudaMeter(device, 0)
    take_steps(made, optimizer, host, steady, WARMUP + STEADY)
    take_steps(made, optimizer, host, fitting, 1)
    assert steady.memory and fitting.memory, "steps after the warm-up were measured"
    found: Answer = steady.memory.as_dict() | {"fitting_peak_mib": fitting.memory.peak_mib, "left_mib": left}
    del made, optimizer
    gc.collect()
    return found | {"held_mib": allocated(device) - left}


def tracked(made: Made, host: Batch) -> Answer:
    begun = []

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        while len(begun) < WARMUP:  # in the tracker's first step codes are fitted, so that the second is steady
            begun.append(made(*args).shape)
        return made(*args, **kwargs)

    found = memory.track(made.model, (host[0].to(made.step.dtype), host[1]), step, made.optimizer)
    return {
        "kind": "tracked-cpu",
        "peak_mib": found.peak_mib,
        "static_mib": found.static_mib,
        "kept_mib": found.kept_mib,
    }


def capped(ask: Answer, device: torch.device, told: Told) -> Answer:
    """Whether steps run when PyTorch may take no more than `limit_mib` from the device."""
    total = torch.cuda.get_device_properties(device).total_memory / MIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, ask["limit_mib"] / total), device)
    try:
        measure(ask, device, told)
        return {"fits": True}
    except torch.OutOfMemoryError:
        return {"fits": False}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_kernels(ask: Answer, device: torch.device, told: Told) -> Answer:
    if device.type == "cuda":
        from s2a_cli.activations import kernels

        if not (running := kernels.available()).startswith("triton"):
            raise UserError(f"no kernel runs here, so none was compared: {running}")
    return check_row(row_of(ask), ask["words"], device)


def compile_row(ask: Answer, device: torch.device, told: Told) -> Answer:
    """Compiles a row, so that the compiler finds it in its cache when the row is timed."""
    start = time.monotonic()
    made = Made(row_of(ask), ask["words"], device)
    images, targets = noise(made.backbone.image.size, ask["batch"])
    made.compile()
    made(made.model, made.optimizer(), images.to(device, made.step.dtype), targets.to(device))
    return {"seconds": time.monotonic() - start}


def speed(ask: Answer, device: torch.device, told: Told) -> Answer:
    """Images a second of several rows; each step is told.

    context_mib: of the device, outside of PyTorch's allocator.
    """
    entries = [blank(BY_NAME[name]) for name in ask["rows"]]

    def tell(name: str, seconds: float | None) -> None:
        told({"row": name, "seconds": seconds})

    time_rows(entries, ask["words"], ask["batch"], ask["steps"], device, tell, time.monotonic() + ask["seconds"])
    kept = ("name", "seconds", "images_per_second", "beside_mib", "problems")
    return {"rows": [{key: entry.get(key) for key in kept} for entry in entries], "context_mib": context(device)}


def context(device: torch.device) -> float | None:
    """MiB of the device that are in use outside of PyTorch's allocator, others' included; None where that can't be
    asked.
    """
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / MIB


def host(ask: Answer, device: torch.device, told: Told) -> Answer:
    made = Made(row_of(ask), ask["words"], device)
    return host_share(made, noise(made.backbone.image.size, ask["batch"]), ask["steps"]) | {
        "context_mib": context(device)
    }


KINDS = {
    "about": about,
    "predict": predict,
    "measure": measure,
    "capped": capped,
    "kernels": check_kernels,
    "compile": compile_row,
    "speed": speed,
    "host": host,
}


def allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else 0.0


def clean(device: torch.device) -> None:
    """Nothing of a row is alive when the next begins: graphs in cycles, compiled code, workspaces, cached segments."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises where a kernel went wrong
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


def answered(ask: Answer, device: torch.device, say: Callable[[Answer], None]) -> Answer:
    try:
        return {"done": KINDS[ask["kind"]](ask, device, lambda message: say({"told": message}))}
    except UserError as error:
        return {"failed": str(error), "refused": True}
    except Exception as error:
        traceback.print_exc()
        return {
            "failed": f"{type(error).__name__}: {first_line(error)}",
            "out_of_memory": bool(OUT_OF_MEMORY.search(str(error))),
        }


def chosen(name: str) -> torch.device:
    """The device, as training sets it up. With its number: without one some functions of torch.cuda refuse it."""
    device = choose_device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def main(name: str) -> int:
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(message: Answer) -> None:
        print(json.dumps(message), file=stream, flush=True)

    device = None
    for line in sys.stdin:
        ask = json.loads(line)
        print(f"--- {line.strip()}", file=sys.stderr, flush=True)
        if device is None:
            try:
                device = chosen(name)
            except Exception as error:
                say({"failed": f"{type(error).__name__}: {first_line(error)}", "ends": True})
                return 1
        found = answered(ask, device, say)
        try:
            clean(device)
        except Exception as error:  # the context is gone: no other row can run in this process
            say(
                found
                | ({} if "failed" in found else {"failed": f"{type(error).__name__}: {first_line(error)}"})
                | {"ends": True}
            )
            return 1
        say(found)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)  # a broken context hangs in destructors
