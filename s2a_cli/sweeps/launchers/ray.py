"""Runs as tasks of a Ray cluster: that of RAY_ADDRESS or of this machine, else one of this machine alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.interrupts import PARENT
from s2a_cli.sweeps.launchers.local import POLL, Process
from s2a_cli.sweeps.launchers.remote import INTERRUPTED, LOST, Again, Queue, note, settle

PREFIXES = ("S2A_", "OMP_", "MKL_", "CUDA_", "CUBLAS_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "NCCL_")
NEEDED = {
    *("PYTHONPATH", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TORCH_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"),  # not HF_TOKEN
}


class Ray(Queue):
    """One task a run, with a GPU where the cluster has some, else with a core.

    Raises UserError when Ray is not installed.
    """

    def __init__(self, workers: int | None):
        super().__init__(workers)
        try:
            import ray
        except ImportError:
            raise UserError("sweep.launcher=ray needs a package that is not here: pip install 's2a[ray]'") from None
        options = {"logging_level": "error", "log_to_driver": False}
        try:
            ray.init(address="auto", **options)
            where = "the Ray cluster at " + ray.get_runtime_context().gcs_address
        except ConnectionError:
            ray.init(include_dashboard=False, **options)
            where = "a Ray cluster of this machine alone; RAY_ADDRESS names another"
        gpus = ray.cluster_resources().get("GPU", 0)
        self.note = f"s2a: on {where}; {gpus:g} GPUs, {ray.cluster_resources().get('CPU', 0):g} cores"
        self._attend = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, max_retries=0)(attend)

    def start(self, words: list[str], log: Path, slot: int) -> Again:
        return Again(words, lambda words: Task(self._attend, words, log.absolute()))

    def close(self) -> None:
        import ray

        ray.shutdown()


class Task:
    """One attempt at a run, on whatever machine of the cluster."""

    def __init__(self, remote: object, words: list[str], log: Path):
        self._log = log
        self._reference = remote.remote(words, log, os.getcwd(), handed(words, os.environ))

    def poll(self) -> int | None:
        import ray

        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return ray.get(self._reference)
        except ray.exceptions.TaskCancelledError:
            return INTERRUPTED
        except ray.exceptions.RayTaskError as error:
            note(self._log, str(error).strip().splitlines()[-1])
            return 1
        except ray.exceptions.RayError as error:
            note(self._log, f"lost its Ray worker: {type(error).__name__}")
            return LOST

    def stop(self) -> None:
        import ray

        ray.cancel(self._reference)


def handed(words: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """What a run needs of the sweep's environment: where its data and caches lie, how torch computes, and what its
    words name.

    The cluster may be another's: tokens and all else stay here. A worker that needs more has it in its own environment.
    """
    named = set(re.findall(r"\$\{\s*oc\.env\s*:\s*(\w+)", " ".join(words)))
    return {key: value for key, value in environment.items() if key in NEEDED | named or key.startswith(PREFIXES)}


def attend(words: list[str], log: Path, folder: str, environment: dict[str, str]) -> int:
    """On a worker: runs `s2a train` as a process beside this one and returns its exit code.

    environment: see `handed`; what the worker itself has set goes first. A cancelled task is a KeyboardInterrupt here.
    """
    settle(log.parent)
    process = Process(words, log, environment | os.environ | {PARENT: str(os.getpid())}, folder)
    while (code := process.poll()) is None:
        try:
            time.sleep(POLL)
        except KeyboardInterrupt:
            process.stop()
    return code
