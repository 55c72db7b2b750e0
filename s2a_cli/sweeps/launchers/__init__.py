"""Launchers start the runs of a sweep: as processes of this machine, as SLURM jobs, or as Ray tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import SweepConfig


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        ...

    def stop(self) -> None:
        """Asks it to save where it is and to end."""
        ...


class Launcher(Protocol):
    """Starts runs and says how many there can be at a time."""

    note: str  # to be said before it starts

    def free(self, running: dict[int, float | None], needed_mib: float | None) -> int | None:
        """Returns a slot for one more run that is predicted to need so much of a GPU; None where there is none now.

        running: {slot: MiB that it is predicted to need} of the runs at work; None where that is not known.
        """
        ...

    def start(self, words: list[str], log: Path, slot: int) -> Job:
        """Starts `s2a train` with the words; what it says goes to the end of the log."""
        ...

    def close(self) -> None:
        """Lets go of what the launcher holds, when no run is at work any more."""
        ...


def make_launcher(settings: SweepConfig, devices: list[str]) -> Launcher:
    """Returns the launcher that the settings name.

    devices: the `device` of each run. Raises UserError where the launcher can't be had.
    """
    from s2a_cli.sweeps.launchers.local import Local, gpu_mib, visible_gpus

    if settings.launcher != "local" and settings.pack:
        raise UserError(f"sweep.pack=true is for the GPUs of this machine, not for sweep.launcher={settings.launcher}")
    if settings.launcher == "slurm":
        from s2a_cli.sweeps.launchers.slurm import Slurm

        return Slurm(settings.workers, settings.slurm)
    if settings.launcher == "ray":
        from s2a_cli.sweeps.launchers.ray import Ray

        return Ray(settings.workers)
    gpus = visible_gpus() if any(device in ("auto", "cuda") for device in devices) else []
    if settings.pack and not gpus:
        raise UserError(
            "sweep.pack=true puts several runs on a GPU, and there is none here; set sweep.workers=N instead"
        )
    named = any(device.startswith("cuda:") for device in devices)
    return Local(settings.workers or max(1, len(gpus)), gpus, gpu_mib() if settings.pack else None, named)
