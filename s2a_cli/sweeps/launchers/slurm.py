"""Runs as SLURM jobs, through submitit: a job that is preempted or out of time is requeued and goes on where it was.

A run's folder remembers its job, in slurm/job.json, so that a run that still waits in the queue is not submitted twice.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.interrupts import PARENT
from s2a_cli.common.text import nearest
from s2a_cli.results import record, run_folder
from s2a_cli.sweeps.launchers.local import POLL, Process
from s2a_cli.sweeps.launchers.remote import (
    INTERRUPTED,
    LOST,
    Queue,
    RetriedJob,
    append_note,
    resumed,
    wait_until_saved,
)

FOLDER, JOB = "slurm", "job.json"  # in a run's folder: submitit's files, and the job that was submitted last
REQUEUES = 20  # time limits after which a run is reported as lost
TIMEOUT = 240  # minutes, where sweep.slurm says nothing
LOOK = 1.0  # seconds between two looks at a job
LATE = 10.0  # seconds by which a file may come later than the end of its job, on shared storage
UNKNOWN = 600.0  # seconds after which a job that SLURM does not know counts as forgotten


class Slurm(Queue):
    """Starts each run as a SLURM job.

    settings: of submitit's AutoExecutor, those of SLURM alone without their prefix; `cluster: local` imitates SLURM on
    this machine. Raises UserError where submitit or SLURM is missing, and for settings that submitit does not have.
    """

    note = ""

    def __init__(self, workers: int | None, settings: dict[str, Any]):
        super().__init__(workers)
        try:
            import submitit
        except ImportError:
            raise UserError("sweep.launcher=slurm needs a package that is not here: pip install 's2a[slurm]'") from None
        settings = {"timeout_min": TIMEOUT, "name": "s2a"} | settings
        self._cluster = settings.pop("cluster", "slurm")
        self._submitit, self._settings = submitit, settings
        if self._cluster not in ("slurm", "local"):
            raise UserError(
                f"sweep.slurm.cluster={self._cluster}: expected slurm, or local to imitate it on this machine"
            )
        with tempfile.TemporaryDirectory() as nowhere:
            self._executor(Path(nowhere))  # raises now for what would fail at the first job

    def _executor(self, folder: Path) -> Any:
        """Returns submitit's executor with the settings; its files lie in the folder."""
        requeues = {"slurm_max_num_timeout": REQUEUES, "local_max_num_timeout": REQUEUES}
        try:
            executor = self._submitit.AutoExecutor(folder, cluster=self._cluster, **requeues)
        except RuntimeError as error:
            raise UserError(
                f"sweep.launcher=slurm: {error}; sweep.slurm.cluster=local imitates it on this machine"
            ) from None
        shared, own = executor._valid_parameters(), self._submitit.SlurmExecutor._valid_parameters()
        for key in self._settings.keys() - shared - own:
            raise UserError(f"sweep.slurm.{key}: no such setting of submitit's{nearest(key, shared | own)}")
        try:
            executor.update_parameters(
                **{key if key in shared else f"slurm_{key}": v for key, v in self._settings.items()}
            )
        except Exception as error:  # submitit has several ways to refuse a value
            raise UserError(f"sweep.slurm: {str(error).splitlines()[0]}") from None
        return executor

    def start(self, words: list[str], log: Path, slot: int) -> RetriedJob:
        """Submits `s2a train` with the words, and again where its job is lost."""
        return RetriedJob(words, lambda words: self._submit(words, log.absolute()))

    def _submit(self, words: list[str], log: Path) -> Submitted:
        """Returns the job of a run: the one that waits or runs already, or else a new one."""
        folder = log.parent / FOLDER
        folder.mkdir(exist_ok=True)
        with FileLock(folder / run_folder.LOCK):
            if there := self._there(folder, log):
                return there
            try:
                job = self._executor(folder).submit(Attempt(words, log, os.getcwd()))
            except RuntimeError as error:  # sbatch
                raise UserError(f"sweep.launcher=slurm: {str(error).strip().splitlines()[-1]}") from None
            atomic_write(folder / JOB, json.dumps({"cluster": self._cluster, "id": job.job_id}))
        return Submitted(job, log)

    def _there(self, folder: Path, log: Path) -> Submitted | None:
        """Returns the job that was submitted before, where it still waits or runs."""
        try:
            kept = json.loads(record.regular(folder / JOB))
            age = time.time() - (folder / JOB).stat().st_mtime
            kind = {"slurm": self._submitit.SlurmJob, "local": self._submitit.LocalJob}[kept["cluster"]]
            submitted = Submitted(kind(folder, kept["id"]), log)
        except (OSError, ValueError, KeyError):
            return None
        return None if submitted.over() or (submitted.state() == "UNKNOWN" and age > UNKNOWN) else submitted


class Submitted:
    """A job of a run, as the sweep sees it."""

    def __init__(self, job: Any, log: Path):
        self._job, self._log = job, log
        self._code: int | None = None
        self._next = 0.0  # when to look at it again
        self._ended: float | None = None  # when it was first seen to be over without a result
        self._stopped = False

    def state(self) -> str:
        """Returns what SLURM says about the job."""
        return self._job.state

    def over(self) -> bool:
        """Returns whether the job neither waits nor runs."""
        job = self._job
        if job.paths.result_pickle.exists():
            return True
        if type(job).__name__ == "LocalJob" and job.state.startswith("NO PROCESS"):  # of another sweep
            return not Path(f"/proc/{job.job_id}").exists()
        return job.done()

    def poll(self) -> int | None:
        """Returns the exit code; LOST where the job is gone, None while it waits or runs."""
        if self._code is None and time.monotonic() >= self._next:
            self._code = self._look()
            self._next = time.monotonic() + LOOK
        return self._code

    def _look(self) -> int | None:
        """Asks SLURM and the job's files how it ended; None while it waits or runs."""
        if not self.over():
            return None
        code = INTERRUPTED
        if self._job.paths.result_pickle.exists():
            if error := self._job.exception():
                append_note(self._log, str(error).strip().splitlines()[-1])
                return 1
            code = self._job.result()
        if code != INTERRUPTED or self._stopped:
            return code
        self._ended = self._ended or time.monotonic()
        if time.monotonic() - self._ended < LATE:
            return None
        self._job.get_info(mode="force")
        own = f"its own output is in {self._job.paths.folder}"
        append_note(self._log, f"SLURM job {self._job.job_id} ended as {self.state()}; {own}")
        return 1 if self.state().startswith("CANCELLED") else LOST  # cancelled by hand, it is not wanted any more

    def stop(self) -> None:
        """Cancels the job, whose run then saves where it is."""
        self._stopped = True
        self._job.cancel(check=False)


class Attempt:
    """The work of a job: runs `s2a train` as a process beside it and returns its exit code."""

    def __init__(self, words: list[str], log: Path, folder: str):
        self.words, self.log, self.folder = words, log, folder
        self._process: Process | None = None

    def __call__(self) -> int:
        wait_until_saved(self.log.parent)
        # The process inherits that it ignores SLURM's warning, which reaches all processes of a job.
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._process = Process(self.words, self.log, os.environ | {PARENT: str(os.getpid())}, self.folder)
        signal.signal(signal.SIGUSR2, before)
        try:
            while not self._process.ended():
                time.sleep(POLL)
        except RuntimeError:  # submitit's: the job was warned, and is not requeued; see `checkpoint`
            pass
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Returns what to submit instead of a job that is preempted or out of time, after its run has saved.

        Called by submitit within a signal handler.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.stop()
            while not self._process.ended():
                time.sleep(POLL)
            if self._process.wait() != INTERRUPTED:
                return None  # it was at its end
        return DelayedSubmission(Attempt(resumed(self.words), self.log, self.folder))
