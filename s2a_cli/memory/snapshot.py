"""Writes PyTorch's own record of all allocations on CUDA, as `profile=memory` asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FILE = "memory_snapshot.pickle"  # for https://pytorch.org/memory_viz
ENTRIES = 200_000  # of the newest allocations and releases


@contextmanager
def snapshot(folder: Path, device: torch.device, wanted: bool) -> Iterator[None]:
    """Records allocations within, and writes them to the run's folder at the end.

    They are written also where the run ran out of memory.
    """
    if not wanted:
        yield
        return
    if device.type != "cuda":
        print(
            f"s2a: profile=memory needs CUDA: {device} has no record of allocations; `s2a memory` predicts them",
            file=sys.stderr,
        )
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(folder / FILE))
        torch.cuda.memory._record_memory_history(enabled=None)
        print(f"memory snapshot: {folder / FILE}, to be looked at on https://pytorch.org/memory_viz")
