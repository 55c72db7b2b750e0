"""Runs as processes of this machine, each with a GPU of its own where there are some."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from s2a_cli.common.interrupts import PARENT

POLL = 0.2  # seconds
CONTEXT_MIB = 1024  # of a process on a GPU beside what it allocates: the CUDA context and libraries; for packing


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, for CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]


def gpu_mib() -> float:
    """Memory of the smallest GPU."""
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**20


def opened(log: Path) -> IO[bytes]:
    """A run's log, to write to its end. Raises OSError for a link or a pipe, which somebody may have put there."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(log, flags, 0o666), "ab")


class Process:
    """A run as a process of this machine, in a working folder: null is the present one."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str], folder: str | None = None):
        command = [sys.executable, "-m", "s2a_cli", "train", *words]
        with opened(log) as file:
            file.write(f"$ s2a {shlex.join(command[3:])}\n".encode())
            file.flush()
            # a group of its own: a Ctrl-C is for the sweep, which passes it on once
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment | {"PYTHONUNBUFFERED": "1"},  # an error is the last line of the log
                cwd=folder,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def ended(self) -> bool:
        """As `poll() is not None`, but also within a signal that came in the middle of a poll, which holds a lock."""
        return self._process.returncode is not None or bool(
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        )

    def wait(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        if self.poll() is None:
            self._process.send_signal(signal.SIGINT)


class Local:
    """`workers` slots. With GPUs slot i has GPU i % len(gpus) alone; packed, a GPU takes what fits into `pack_mib`.

    named: the runs name their GPUs themselves, by device=cuda:N.
    """

    def __init__(self, workers: int, gpus: list[str], pack_mib: float | None = None, named: bool = False):
        self.workers, self.gpus, self.pack_mib = workers, gpus, pack_mib
        self.shared = shared = bool(pack_mib or workers > len(gpus) if gpus else named and workers > 1)
        said = (
            "s2a: several runs share a GPU: the peaks in their results are predicted, and their speeds are no figures"
        )
        self.note = said if shared else ""

    def free(self, running: dict[int, float | None], peak_mib: float | None) -> int | None:
        if self.pack_mib is None:
            return next((slot for slot in range(self.workers) if slot not in running), None)
        here = {
            gpu: [peak for slot, peak in running.items() if slot % len(self.gpus) == gpu]
            for gpu in range(len(self.gpus))
        }
        taken = {gpu: sum((peak or self.pack_mib) + CONTEXT_MIB for peak in peaks) for gpu, peaks in here.items()}
        for gpu in sorted(taken, key=taken.get):
            room = self.pack_mib - taken[gpu]
            if not here[gpu] or (peak_mib or self.pack_mib) + CONTEXT_MIB <= room:
                slots = range(gpu, (len(running) + 1) * len(self.gpus), len(self.gpus))
                return next(slot for slot in slots if slot not in running)
        return None

    def start(self, words: list[str], log: Path, slot: int) -> Process:
        environment = os.environ | {PARENT: str(os.getpid())}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif self.workers > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.workers)))
        if self.shared and not any(word.lstrip("+").startswith("busy=") for word in words):
            words = [*words, "busy=allow"]  # else each would refuse what another of the sweep holds
        return Process(words, log, environment)

    def close(self) -> None:
        pass
