"""Seconds of single steps of several rows side by side, in one process."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable

import torch
from energy import Packages
from rows import BY_NAME, Batch, Entry, Made, noise, problems

from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.memory.result import MIB
from s2a_cli.training.loop import WARMUP_STEPS

Tell = Callable[[str, float | None], None]  # a row's name, and the seconds of a step of it; None: it begins


def time_rows(
    entries: list[Entry],
    words: list[str],
    batch: int,
    steps: int,
    device: torch.device,
    tell: Tell = lambda name, seconds: None,
    until: float = math.inf,
) -> None:
    """Fills in `seconds`, `images_per_second`, on CUDA `beside_mib`, on CPUs that tell it `joules` a step, of entries.
    Between two steps of a row that are timed every other row has one.

    until: of time.monotonic(), when no other round of steps begins. No more rows are made ready when two thirds of the
    time until then are over: those that are left say so. beside_mib: most that a step has allocated less what the other
    rows hold, weights, optimiser state and images included.
    """
    cuda, began = device.type == "cuda", time.monotonic()
    ready: dict[str, Callable[[], float]] = {}
    seconds: dict[str, list[float]] = {}
    images: list[Batch] = []  # on the device, the same for all rows
    with Progress("speed", len(entries) * (steps + 1), " steps") as progress:
        for entry in entries:
            tell(entry["name"], None)
            with problems(entry, "speed"):
                if BY_NAME[entry["name"]].offload and not cuda:
                    raise UserError("a CPU has no other memory to move what is kept to")
                if time.monotonic() - began > (until - began) * 2 / 3:
                    raise UserError("no time was left")
                ready[entry["name"]] = made_ready(entry, words, batch, device, images)
            progress.add(1, row=entry["name"])
        order, draw = list(entries), random.Random(0)
        for number in range(steps):
            if number and time.monotonic() >= until:
                break
            draw.shuffle(order)
            for entry in order:
                if entry["name"] in ready:
                    tell(entry["name"], None)
                    with problems(entry, "speed"):
                        took = ready[entry["name"]]()
                        seconds.setdefault(entry["name"], []).append(took)
                        tell(entry["name"], took)
                    if "speed" in entry["problems"]:
                        del ready[entry["name"]]
                progress.add(1, row=entry["name"])
    for entry in entries:
        if entry["name"] in ready:
            set_speed(entry, seconds[entry["name"]], batch)
            if not cuda and time.monotonic() < until:
                entry["joules"] = Packages().joules(ready[entry["name"]])


def set_speed(entry: Entry, seconds: list[float], batch: int) -> None:
    entry["seconds"] = [round(value, 7) for value in seconds]
    entry["images_per_second"] = batch / statistics.median(seconds)


def made_ready(
    entry: Entry, words: list[str], batch: int, device: torch.device, images: list[Batch]
) -> Callable[[], float]:
    """The row's timed step, warmed up: with its state, compiled, its kernels built."""
    before, shared = allocated(device), sum(tensor.nbytes for ready in images for tensor in ready)
    made = Made(BY_NAME[entry["name"]], words, device)
    if not images:
        host = noise(made.backbone.image.size, batch)
        images.append((host[0].to(device, made.step.dtype), host[1].to(device)))
    step = timer(made, images[0])
    for _ in range(WARMUP_STEPS if device.type == "cuda" else 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        entry["beside_mib"] = (torch.cuda.max_memory_allocated(device) - before + shared) / MIB
    return step


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def timer(made: Made, batch: Batch) -> Callable[[], float]:
    """A function that takes one step and gives its seconds."""
    made.compile()
    optimizer = made.optimizer()

    def step() -> float:
        synchronize(made.device)
        start = time.perf_counter()
        made(made.model, optimizer, *batch)
        synchronize(made.device)
        return time.perf_counter() - start

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
