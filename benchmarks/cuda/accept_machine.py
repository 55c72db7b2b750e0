"""What the host has for the processes of accept.py: in a container less than the machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
WORKER_GIB, PREDICTOR_GIB = 6.0, 1.5  # of the host's memory: CUDA's libraries, and backbones that are kept to be copied
FULL_GIB = 18.0  # of the device: full fine-tuning at most, context included


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cores(cgroup: Path = CGROUP) -> int:
    """Processors that this process may use."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").strip().partition(" ")
    return max(1, min(own, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else own


def host_gib(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> float:
    """GiB of the host's memory that are free to use; plenty where nothing tells."""
    found = [float("inf")]
    lines = _read(meminfo).splitlines()
    found += [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (_read(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        found.append((int(limit) - int(used)) / 2**30)
    return min(found)


def processes(total_mib: float | None, cores: int, host_gib: float) -> tuple[int, int]:
    """(that share the device, that predict beside them); no device: one of each."""
    if total_mib is None:
        return 1, 1
    workers = max(1, int(min(8, cores // 2, total_mib / 1024 // FULL_GIB, host_gib // WORKER_GIB)))
    return workers, max(1, int(min(8, cores - workers, (host_gib - WORKER_GIB * workers) // PREDICTOR_GIB)))
