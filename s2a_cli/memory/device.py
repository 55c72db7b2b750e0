"""Who else is at a CUDA device: speeds of a run are figures only where nothing else computes."""

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
PATIENCE = 5.0  # seconds in which what a process held that has just ended may come free
POLL = 0.5
SMI_TIMEOUT = 10.0  # seconds; a driver in trouble does not answer
LOAD = 30  # percent of the time in which kernels run: what draws a screen stays below, what trains does not


def refusal(name: str) -> UserError | None:
    """Why a run should not start on the device of this name: others compute there. None where they don't.

    To be asked before this process holds memory itself. What is not there is the matter of others.
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
    """Whether nothing but this process computes on `device`, as far as the driver tells."""
    return rivals(device) is None


def rivals(device: torch.device) -> str | None:
    """In words, what else computes on a device; None where nothing does.

    Where little is held, nobody is asked: inside a container the driver knows other process ids than we do. What draws
    a screen, and the memory of a device that shares it with the host, is no rival.
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
    """Memory in use that is not in this process's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / MIB


def _shares_host_memory(device: torch.device) -> bool:
    return bool(getattr(_properties(device), "is_integrated", False))


def _properties(device: torch.device) -> object:
    try:
        return torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):
        return None


def processes(device: torch.device) -> list[tuple[int, str, int | None]] | None:
    """(id, name, MiB or None where that is not told) of the processes that compute, as nvidia-smi lists them; None: it
    can't be asked.
    """
    lines = _smi(device, "--query-compute-apps=pid,process_name,used_memory")
    if lines is None:
        return None
    matches = filter(None, (re.fullmatch(r"\s*(\d+), (.*), ([^,]*)", line) for line in lines))
    return [(int(m[1]), m[2].strip(), int(m[3]) if m[3].strip().isdigit() else None) for m in matches]


def driver(device: torch.device) -> str | None:
    """The version of the driver, as nvidia-smi tells it; None: it can't be asked."""
    lines = _smi(device, "--query-gpu=driver_version") or []
    return next((line.strip() for line in lines if re.fullmatch(r"\s*\d[\d.]*\s*", line)), None)


def _state(device: torch.device) -> tuple[bool, int | None]:
    """Whether the device draws a screen, and in how many percent of the last moments kernels ran; None: not told."""
    lines = _smi(device, "--query-gpu=display_active,utilization.gpu") or []
    match = next(filter(None, (re.fullmatch(r"\s*(\w+), *(\d+)\D*", line) for line in lines)), None)
    return (match[1] == "Enabled", int(match[2])) if match else (False, None)


def _smi(device: torch.device, query: str) -> list[str] | None:
    """The lines that nvidia-smi answers; None where it does not."""
    uuid = str(getattr(_properties(device), "uuid", ""))
    chosen = ["-i", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"] if uuid else []
    asked = ["nvidia-smi", query, "--format=csv,noheader,nounits", *chosen]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.splitlines() if said.returncode == 0 else None
