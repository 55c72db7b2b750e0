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


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]


def gpu_mib() -> float:
    """Returns the memory of the smallest GPU, in MiB."""
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**20


def open_log(log: Path) -> IO[bytes]:
    """Opens a run's log to write to its end. Raises OSError for a link or a pipe, which somebody may have put there."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(log, flags, 0o666), "ab")


class Process:
    """A run as a process of this machine.

    folder: the working folder; None stands for the present one.
    """

    def __init__(self, words: list[str], log: Path, environment: dict[str, str], folder: str | None = None):
        command = [sys.executable, "-m", "s2a_cli", "train", *words]
        with open_log(log) as file:
            file.write(f"$ s2a {shlex.join(command[3:])}\n".encode())
            file.flush()
            # In a group of its own: a Ctrl-C is for the sweep, which passes it on once.
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
        """Returns the exit code; None while it runs."""
        return self._process.poll()

    def ended(self) -> bool:
        """Returns whether the process has ended.

        Works also within a signal handler that interrupts a poll, which holds a lock.
        """
        return self._process.returncode is not None or bool(
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        )

    def wait(self) -> int:
        """Waits for the end and returns the exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """Asks the run to save where it is and to end."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGINT)


class Local:
    """Starts runs as processes of this machine, in `workers` slots.

    gpus: slot i has GPU i % len(gpus). pack_mib: a GPU takes as many runs as fit into so many MiB. named: the runs name
    their GPUs themselves, by device=cuda:N.
    """

    def __init__(self, workers: int, gpus: list[str], pack_mib: float | None = None, named: bool = False):
        self.workers, self.gpus, self.pack_mib = workers, gpus, pack_mib
        self.shared = shared = bool(pack_mib or workers > len(gpus) if gpus else named and workers > 1)
        said = (
            "s2a: several runs share a GPU: the peaks in their results are predicted, and their speeds are no figures"
        )
        self.note = said if shared else ""

    def free(self, running: dict[int, float | None], needed_mib: float | None) -> int | None:
        """Returns a free slot, of the GPU with the most room where runs are packed; None where there is none."""
        if self.pack_mib is None:
            return next((slot for slot in range(self.workers) if slot not in running), None)
        whole, count = self.pack_mib, len(self.gpus)
        here = [[needed for slot, needed in running.items() if slot % count == gpu] for gpu in range(count)]
        taken = [sum(needed or whole for needed in runs) for runs in here]
        for gpu in sorted(range(count), key=taken.__getitem__):
            if not here[gpu] or (needed_mib or whole) <= whole - taken[gpu]:
                slots = range(gpu, (len(running) + 1) * count, count)
                return next(slot for slot in slots if slot not in running)
        return None

    def start(self, words: list[str], log: Path, slot: int) -> Process:
        """Starts `s2a train` with the words on the GPU of the slot, or with a share of the cores."""
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
        """Does nothing: the processes have ended."""
