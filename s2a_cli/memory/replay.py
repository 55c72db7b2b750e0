"""Replays what PyTorch's allocator has recorded on a CUDA device in the simulated allocator.

Reads files of `torch.cuda.memory._dump_snapshot`, such as `profile=memory` writes, without a GPU. They are pickles of
plain dictionaries, lists, numbers and texts: anything else in one is refused, and no code in it is run.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from s2a_cli.common import tensor_files
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line
from s2a_cli.memory.allocator import BLOCK, Allocator

MOST = 1 << 30  # bytes of a snapshot, unpacked
GZIP = b"\x1f\x8b"  # the first bytes of a file that gzip has written
RESERVES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class Event(NamedTuple):
    """A block that the allocator handed out, or that came back to it."""

    came: bool
    address: int
    bytes: int  # rounded up to 512
    stream: int


@dataclass(frozen=True)
class Replay:
    """What an allocator took from its device, as it recorded it and as the simulation has it; in bytes, at the most."""

    device: int
    events: int
    before: int  # blocks that were there when the recording began
    expandable: bool  # as it was set
    allocated: int
    recorded: int  # taken from the device
    simulated: int  # the same, by the simulation
    otherwise: int  # likewise, with the other setting of expandable_segments


def replay(path: Path) -> Replay:
    """Replays the device with the most events of a snapshot.

    Raises UserError for a file that is missing, damaged or no snapshot, and for one without a record of allocations.
    """
    snapshot = _read(path)
    try:
        traces, settings = snapshot["device_traces"], snapshot.get("allocator_settings", {})
        device = max(range(len(traces)), key=lambda number: len(traces[number]), default=0)
        trace = traces[device] if traces else []
        segments = [segment for segment in snapshot["segments"] if segment["device"] == device]
        events = list(_events(trace))
        before = _before(events, segments)
        expandable = bool(settings.get("expandable_segments", any(s.get("is_expandable") for s in segments)))
        recorded = _recorded(trace, segments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"snapshot={path}: no memory snapshot of PyTorch ({type(error).__name__}: {error})") from None
    if not events:
        raise UserError(
            f"snapshot={path}: has no record of allocations; torch.cuda.memory._record_memory_history() starts one"
        )
    allocated, simulated = _simulated([*before, *events], expandable)
    _, otherwise = _simulated([*before, *events], not expandable)
    return Replay(device, len(events), len(before), expandable, allocated, recorded, simulated, otherwise)


class _Plain(pickle.Unpickler):
    """Reads a pickle that names no class and no function."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"names {module_name}.{global_name}")


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a snapshot. Raises UserError."""
    if not tensor_files.is_file(path):
        raise UserError(f"snapshot={path}: no such file")
    try:
        with open(path, "rb") as file:
            packed = file.read(len(GZIP)) == GZIP
        with gzip.open(path) if packed else open(path, "rb") as file:
            text = file.read(MOST + 1)
        content = _Plain(io.BytesIO(text)).load() if len(text) <= MOST else None
    except Exception as error:  # pickle, gzip and the system raise kinds of their own for a damaged file
        raise UserError(f"snapshot={path}: no memory snapshot of PyTorch, or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"snapshot={path}: no memory snapshot of PyTorch: holds no dictionary")
    return content


def _rounded(size: int) -> int:
    return max(BLOCK, -(-size // BLOCK) * BLOCK)


def _events(trace: list[dict[str, Any]]) -> Iterator[Event]:
    for entry in trace:
        if entry["action"] in ("alloc", "free_completed"):
            came = entry["action"] == "alloc"
            yield Event(came, entry["addr"], _rounded(entry["size"]), entry["stream"])


def _before(events: list[Event], segments: list[dict[str, Any]]) -> list[Event]:
    """Returns the blocks that must have been there when the recording began, by address.

    These are blocks that are freed without having come, and those that are there at the end and never came.
    """
    found, alive = [], {}
    for event in events:
        if event.came:
            alive[event.address] = event
        elif alive.pop(event.address, None) is None:
            found.append(event._replace(came=True))
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            address = block.get("address", address)
            if block["state"].startswith("active") and address not in alive:
                found.append(
                    Event(True, address, _rounded(block.get("requested_size", block["size"])), segment["stream"])
                )
            address += block["size"]
    return sorted(found, key=lambda event: event.address)


def _recorded(trace: list[dict[str, Any]], segments: list[dict[str, Any]]) -> int:
    """Returns the most bytes that were taken from the device, of the segments at the end and what came and went."""
    steps = [RESERVES.get(entry["action"], 0) * entry["size"] for entry in trace]
    taken = sum(segment["total_size"] for segment in segments) - sum(steps)
    most = taken
    for step in steps:
        taken += step
        most = max(most, taken)
    return most


def _simulated(events: list[Event], expandable: bool) -> tuple[int, int]:
    """Returns the most bytes that are allocated, and those that the simulated allocator takes; streams share none."""
    allocators: dict[int, Allocator] = defaultdict(lambda: Allocator(expandable))
    places: dict[int, tuple[Allocator, int, int]] = {}
    allocated = most = 0
    for event in events:
        if event.came:
            allocator = allocators[event.stream]
            places[event.address] = allocator, allocator.take(event.bytes), event.bytes
            allocated += event.bytes
            most = max(most, allocated)
        elif event.address in places:
            allocator, address, size = places.pop(event.address)
            allocator.give(address)
            allocated -= size
    return most, sum(allocator.reserved for allocator in allocators.values())
