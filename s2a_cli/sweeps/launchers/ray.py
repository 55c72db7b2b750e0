"""Runs as tasks of a Ray cluster: that of RAY_ADDRESS or of this machine, else a new one of this machine alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.interrupts import PARENT
from s2a_cli.sweeps.launchers.local import POLL, Process
from s2a_cli.sweeps.launchers.remote import INTERRUPTED, LOST, Queue, RetriedJob, append_note, wait_until_saved

# What of the environment is sent to a worker.
PREFIXES = ("S2A_", "OMP_", "MKL_", "CUDA_", "CUBLAS_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "NCCL_")
NEEDED = {
    *("PYTHONPATH", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TORCH_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"),  # not HF_TOKEN
}


class Ray(Queue):
    """Starts each run as a task, with a GPU where the cluster has some, else with a core.

    Raises UserError where Ray is not installed.
    """

    def __init__(self, workers: int | None):
        super().__init__(workers)
        try:
            import ray
        except ImportError:
            raise UserError("sweep.launcher=ray needs a package that is not here: pip install 's2a[ray]'") from None
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        try:
            ray.init(address="auto", **options)
            where = "the Ray cluster at " + ray.get_runtime_context().gcs_address
        except ConnectionError:
            ray.init(include_dashboard=False, **options)
            where = "a Ray cluster of this machine alone; RAY_ADDRESS names another"
        gpus = ray.cluster_resources().get("GPU", 0)
        self.note = f"s2a: on {where}; {gpus:g} GPUs, {ray.cluster_resources().get('CPU', 0):g} cores"
        self._remote = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, max_retries=0)(run_on_worker)

    def start(self, words: list[str], log: Path, slot: int) -> RetriedJob:
        """Starts `s2a train` with the words as a task, and again where its worker is lost."""
        return RetriedJob(words, lambda words: Task(self._remote, words, log.absolute()))

    def close(self) -> None:
        """Leaves the cluster, and ends one that was started here."""
        import ray

        ray.shutdown()


class Task:
    """One attempt at a run, on whatever machine of the cluster.

    remote: `run_on_worker` as a remote function of Ray.
    """

    def __init__(self, remote: Any, words: list[str], log: Path):
        self._log = log
        self._reference = remote.remote(words, log, os.getcwd(), environment_for(words, os.environ))

    def poll(self) -> int | None:
        """Returns the exit code; LOST where the worker is gone, None while the task runs."""
        import ray
        from ray import exceptions

        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return ray.get(self._reference)
        except exceptions.TaskCancelledError:
            return INTERRUPTED
        except exceptions.RayTaskError as error:
            append_note(self._log, str(error).strip().splitlines()[-1])
            return 1
        except exceptions.RayError as error:
            append_note(self._log, f"lost its Ray worker: {type(error).__name__}")
            return LOST

    def stop(self) -> None:
        """Cancels the task, whose run then saves where it is."""
        import ray

        ray.cancel(self._reference)


def environment_for(words: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what a run needs of the sweep's environment.

    That is where data and caches lie, how torch computes, and what the run's words name. The cluster may be another's:
    tokens and all else stay here. A worker that needs more has it in its own environment.
    """
    named = set(re.findall(r"\$\{\s*oc\.env\s*:\s*(\w+)", " ".join(words)))
    return {key: value for key, value in environment.items() if key in NEEDED | named or key.startswith(PREFIXES)}


def run_on_worker(words: list[str], log: Path, folder: str, environment: dict[str, str]) -> int:
    """Runs `s2a train` as a process beside the worker's own and returns its exit code.

    environment: of the sweep; what the worker itself has set goes first. Ray raises KeyboardInterrupt here when the
    task is cancelled.
    """
    wait_until_saved(log.parent)
    process = Process(words, log, environment | os.environ | {PARENT: str(os.getpid())}, folder)
    while (code := process.poll()) is None:
        try:
            time.sleep(POLL)
        except KeyboardInterrupt:
            process.stop()
    return code
