"""Shared by launchers beyond one machine: they have queues of their own, and a run's worker can be lost.

The folders of the runs must lie on storage that all machines see, with file locks (NFS 4, Lustre with flock): results
are read from there, and the locks keep a run from being done twice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from s2a_cli.results import run_folder
from s2a_cli.sweeps.launchers import Job
from s2a_cli.sweeps.launchers.local import open_log

LOST = 69  # EX_UNAVAILABLE: the machine, the worker or the job of a run is gone; its log says more
INTERRUPTED = 130
RETRIES = 2
SAVING = 60.0  # seconds that a run may take to save where it is, once it was told to end


class Queue:
    """Has slots for all runs at once, or for `workers` of them: the cluster lets runs wait for their machines."""

    def __init__(self, workers: int | None):
        self.workers = workers

    def free(self, running: dict[int, float | None], needed_mib: float | None) -> int | None:
        """Returns the first free slot; None where `workers` runs are at work."""
        if self.workers and len(running) >= self.workers:
            return None
        return next(slot for slot in itertools.count() if slot not in running)

    def close(self) -> None:
        """Does nothing: jobs may outlive the sweep."""


class RetriedJob:
    """A run that goes on in a new attempt when it was killed or its worker was lost, up to RETRIES times."""

    def __init__(self, words: list[str], start: Callable[[list[str]], Job]):
        self._words, self._start, self._retries, self._stopped = words, start, RETRIES, False
        self._job = start(words)

    def poll(self) -> int | None:
        """Returns the exit code of the last attempt; None while one runs."""
        code = self._job.poll()
        lost = code is not None and (code < 0 or code in (LOST, INTERRUPTED))
        if not lost or self._stopped or not self._retries:
            return code
        self._retries -= 1
        self._job = self._start(resumed(self._words))
        return None

    def stop(self) -> None:
        """Stops the present attempt; it is the last."""
        self._stopped = True
        self._job.stop()


def resumed(words: list[str]) -> list[str]:
    """Returns the words of a run's next attempt, which does not begin from the start once more."""
    return ["--once" if word == "--force" else word for word in words]


def wait_until_saved(folder: Path) -> None:
    """Waits until a run's last attempt, which may have lost its worker a moment ago, has saved where it is."""
    until = time.monotonic() + SAVING
    while time.monotonic() < until:
        try:
            with run_folder.claimed(folder):
                return
        except run_folder.Busy:
            time.sleep(0.5)


def append_note(log: Path, line: str) -> None:
    """Appends a line to a run's log."""
    with open_log(log) as file:
        file.write(f"s2a: {line}\n".encode())
