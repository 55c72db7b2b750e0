"""Finds out whether others compute on a CUDA device: a run's speed is a figure only where nothing else does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import torch

from s2a_cli.common.errors import UserError
from s2a_cli.memory.result import MIB

CONTEXT_MIB = 1024  # what this process may hold outside of PyTorch's allocator: the CUDA context, cuBLAS, cuDNN, NCCL
PATIENCE = 5.0  # seconds in which the memory of a process that has just ended may come free
POLL = 0.5
SMI_TIMEOUT = 10.0  # seconds; a driver in trouble does not answer
LOAD = 30  # percent of the time in which kernels run: drawing a screen stays below, training does not


def refusal(name: str) -> UserError | None:
    """Returns the error that others compute on the device of this name; None where they don't.

    To be asked before this process holds memory itself. A device that does not exist is reported elsewhere.
    """
    device = torch.device("cuda" if name == "auto" else name)
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    until = time.monotonic() + PATIENCE
    while found := rivals(device):
        if time.monotonic() >= until:
            shown = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
            return UserError(
                f"device={shown} ({torch.cuda.get_device_name(shown)}) is not idle: {found}; take another device= or"
                " wait, or set busy=allow to train beside them, with a peak that is predicted and a speed that is no"
                " figure"
            )
        time.sleep(POLL)
    if (held := _held_mib(device)) >= CONTEXT_MIB:
        print(
            f"s2a: {held:,.0f} MiB of {device} are held by what does not compute, such as a screen: it counts as idle",
            file=sys.stderr,
        )
    return None


def is_idle(device: torch.device) -> bool:
    """Returns whether nothing but this process computes on `device`, as far as the driver says."""
    return rivals(device) is None


def rivals(device: torch.device) -> str | None:
    """Returns in words what else computes on a device; None where nothing does.

    Where little memory is held, the driver is not asked: inside a container it knows other process ids than we do. A
    process that draws a screen is no rival, nor is the host on a device that shares its memory.
    """
    try:
        held = _held_mib(device)
    except RuntimeError:  # not even room for a CUDA context
        return "all of its memory is held by processes that can't be seen from here"
    if held < CONTEXT_MIB:
        return None
    listed = processes(device)
    others = [(pid, name, mib) for pid, name, mib in listed or () if pid != os.getpid()]
    if others:
        said = [
            f"process {pid} ({name}, {f'{mib:,} MiB' if mib is not None else 'MiB not known'})"
            for pid, name, mib in others
        ]
        return f"{', '.join(said)} {'hold' if len(said) > 1 else 'holds'} memory of it"
    if _shares_host_memory(device):
        return None
    display, load = _state(device)
    if display or (listed is not None and load is not None and load < LOAD):
        return None
    computing = f", and it computes {load} % of the time" if load else ""
    return f"{held:,.0f} MiB are held by processes that can't be seen from here{computing}"


def _held_mib(device: torch.device) -> float:
    """Returns the memory in use that is not in this process's allocator, in MiB."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / MIB


def _shares_host_memory(device: torch.device) -> bool:
    """Returns whether the device has no memory of its own."""
    return bool(getattr(_properties(device), "is_integrated", False))


def _properties(device: torch.device) -> object:
    """Returns what PyTorch says about a device; None where it can't be asked."""
    try:
        return torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):
        return None


def processes(device: torch.device) -> list[tuple[int, str, int | None]] | None:
    """Returns (id, name, MiB) of the processes that compute, as nvidia-smi lists them; None where it can't be asked.

    The MiB are None where nvidia-smi does not tell them.
    """
    lines = _smi(device, "--query-compute-apps=pid,process_name,used_memory")
    if lines is None:
        return None
    matches = filter(None, (re.fullmatch(r"\s*(\d+), (.*), ([^,]*)", line) for line in lines))
    return [(int(m[1]), m[2].strip(), int(m[3]) if m[3].strip().isdigit() else None) for m in matches]


def driver(device: torch.device) -> str | None:
    """Returns the version of the driver, as nvidia-smi tells it; None where it can't be asked."""
    lines = _smi(device, "--query-gpu=driver_version") or []
    return next((line.strip() for line in lines if re.fullmatch(r"\s*\d[\d.]*\s*", line)), None)


def _state(device: torch.device) -> tuple[bool, int | None]:
    """Returns whether the device draws a screen, and in how many percent of the last moments kernels ran.

    The percentage is None where nvidia-smi does not tell it.
    """
    lines = _smi(device, "--query-gpu=display_active,utilization.gpu") or []
    match = next(filter(None, (re.fullmatch(r"\s*(\w+), *(\d+)\D*", line) for line in lines)), None)
    return (match[1] == "Enabled", int(match[2])) if match else (False, None)


def _smi(device: torch.device, query: str) -> list[str] | None:
    """Returns the lines that nvidia-smi answers; None where it does not."""
    uuid = str(getattr(_properties(device), "uuid", ""))
    chosen = ["-i", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"] if uuid else []
    asked = ["nvidia-smi", query, "--format=csv,noheader,nounits", *chosen]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.splitlines() if said.returncode == 0 else None
