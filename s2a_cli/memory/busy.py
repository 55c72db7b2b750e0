"""Who else is at a CUDA device: peaks and speeds of a run are figures only on a device of its own."""

from __future__ import annotations

import os
import re
import subprocess
import time

import torch

from s2a_cli.errors import UserError
from s2a_cli.memory.measure import device_is_idle
from s2a_cli.memory.result import MIB

PATIENCE = 5.0  # seconds in which what a process held that has just ended may come free
POLL = 0.5
SMI_TIMEOUT = 10.0  # seconds; a driver in trouble does not answer


def refusal(name: str) -> UserError | None:
    """Why a run should not start on the device of this name: other processes hold memory of it. None where they don't.

    To be asked before this process holds memory itself. What is not there is the matter of others.
    """
    device = torch.device("cuda" if name == "auto" else name)
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    until = time.monotonic() + PATIENCE
    while not _idle(device):
        if time.monotonic() >= until:
            shown = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
            return UserError(
                f"device={shown} ({torch.cuda.get_device_name(shown)}) is not idle: {holders(shown)}; take another device="
                " or wait, or set busy=allow to train beside them, with a peak that is predicted and a speed that is no figure"
            )
        time.sleep(POLL)
    return None


def _idle(device: torch.device) -> bool:
    try:
        return device_is_idle(device)
    except RuntimeError:  # not even room for a CUDA context
        return False


def holders(device: torch.device) -> str:
    """In words, the processes that hold memory of a device, as the driver knows them, or how many MiB are held unseen."""
    found = [(pid, name, mib) for pid, name, mib in processes(device) if pid != os.getpid()]
    if found:
        held = [f"process {pid} ({name}, {f'{mib:,} MiB' if mib is not None else 'MiB not known'})" for pid, name, mib in found]
        return f"{', '.join(held)} {'hold' if len(held) > 1 else 'holds'} memory of it"
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return "all of its memory is held by processes that can't be seen from here"
    held = (total - free - torch.cuda.memory_reserved(device)) / MIB
    return f"{held:,.0f} MiB are held by processes that can't be seen from here"


def processes(device: torch.device) -> list[tuple[int, str, int | None]]:
    """(id, name, MiB or None where that is not told) of the processes that nvidia-smi lists; none where it can't be asked."""
    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    chosen = ["-i", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"] if uuid else []
    asked = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits", *chosen]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = said.stdout.splitlines() if said.returncode == 0 else []
    matches = filter(None, (re.fullmatch(r"\s*(\d+), (.*), ([^,]*)", line) for line in lines))
    return [(int(m[1]), m[2].strip(), int(m[3]) if m[3].strip().isdigit() else None) for m in matches]
