"""Simulates PyTorch's caching allocator for CUDA: what it takes from the device, fragmentation included.

The rules are those of c10/cuda/CUDACachingAllocator.cpp. replay.py holds the simulation against what the allocator
itself has recorded.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, insort
from collections.abc import Iterable

from s2a_cli.memory.result import MIB

# Of CUDACachingAllocator: kMinBlockSize, kSmallSize, kMinLargeAlloc, kRoundLarge, kSmallBuffer, kLargeBuffer.
BLOCK, SMALL, LARGE, ROUND = 512, 1 * MIB, 10 * MIB, 2 * MIB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
POOL = 1 << 50  # bytes of addresses for each pool, of which expandable segments map what they need
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the environment's, of which the later name is newer


def is_expandable() -> bool:
    """Returns whether the environment asks PyTorch for expandable segments."""
    return any(re.search(r"expandable_segments:\s*true", os.environ.get(name, ""), re.IGNORECASE) for name in SETTINGS)


class Allocator:
    """The caching allocator of one stream, with its default settings but for `expandable_segments`.

    Requests up to 1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, others from segments of
    their own in steps of 2 MiB. The smallest free block that fits is taken, and split where enough remains. Free
    neighbours are joined. Segments are never given back, because a device that is not full gives no cause to.

    expandable: there is one segment for requests up to 1 MiB and one for others. Each grows at its end, in steps of 2
    and of 20 MiB, and its last block is taken only where no other fits.
    """

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.reserved = 0  # bytes
        # small or not -> [(bytes, address)] of the free blocks, sorted
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._size: dict[int, int] = {}  # address -> bytes of every block
        self._after: dict[int, int] = {}  # address -> that of the next block in the segment
        self._ahead: dict[int, int] = {}  # address -> that of the block before
        self._small: dict[int, bool] = {}  # address -> whether it is of a segment for small requests
        self._next = {True: 0, False: POOL}  # address of the next segment, or of what an expandable one maps next
        self._last: dict[bool, int] = {}  # the last block of each expandable segment

    def take(self, size: int) -> int:
        """Returns the address of a new block of `size` bytes, a multiple of 512."""
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        if place < len(free) and free[place][1] == self._last.get(small) and place + 1 < len(free):
            place += 1
        if place < len(free):
            _, address = free.pop(place)
        elif self.expandable:
            address = self._grow(size, small)
        else:
            address = self._segment(size, small)
        rest = self._size[address] - size
        if rest >= BLOCK if small or self.expandable else rest > SMALL:
            self._split(address, size, small)
        return address

    def give(self, address: int) -> None:
        """Frees a block, and joins it with free neighbours."""
        small = self._small[address]
        if (after := self._after.get(address)) is not None and self._is_free(small, after):
            self._free[small].remove((self._size[after], after))
            self._join(address, after)
        if (ahead := self._ahead.get(address)) is not None and self._is_free(small, ahead):
            self._free[small].remove((self._size[ahead], ahead))
            self._join(ahead, address)
            address = ahead
        insort(self._free[small], (self._size[address], address))

    def _is_free(self, small: bool, address: int) -> bool:
        free, item = self._free[small], (self._size[address], address)
        place = bisect_left(free, item)
        return free[place : place + 1] == [item]

    def _segment(self, size: int, small: bool) -> int:
        """Returns the address of a segment that is new."""
        length = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
        self.reserved += length
        address, self._next[small] = self._next[small], self._next[small] + length
        self._size[address], self._small[address] = length, small
        return address

    def _grow(self, size: int, small: bool) -> int:
        """Returns the address of the last block of an expandable segment, which now has at least this size."""
        last, step = self._last.get(small), SMALL_SEGMENT if small else LARGE_SEGMENT
        is_free = last is not None and self._is_free(small, last)
        if last is not None and is_free:
            self._free[small].remove((self._size[last], last))
        lacking = size - (self._size[last] if last is not None and is_free else 0)
        length = -(-lacking // step) * step
        self.reserved += length
        address, self._next[small] = self._next[small], self._next[small] + length
        self._size[address], self._small[address] = length, small
        if last is not None:
            self._link(last, address)
        self._last[small] = address
        if last is not None and is_free:
            self._join(last, address)
            return last
        return address

    def _split(self, address: int, size: int, small: bool) -> None:
        rest = address + size
        self._size[rest], self._small[rest] = self._size[address] - size, small
        self._size[address] = size
        self._link(rest, self._after.pop(address, None))
        self._link(address, rest)
        if self._last.get(small) == address:
            self._last[small] = rest
        insort(self._free[small], (self._size[rest], rest))

    def _join(self, first: int, second: int) -> None:
        small = self._small[first]
        if self._last.get(small) == second:
            self._last[small] = first
        self._size[first] += self._size.pop(second)
        self._ahead.pop(second, None)
        self._link(first, self._after.pop(second, None))

    def _link(self, first: int, second: int | None) -> None:
        if second is None:
            self._after.pop(first, None)
        else:
            self._after[first], self._ahead[second] = second, first


def reserved(timeline: Iterable[tuple[int, int]], begins_at: int, steps: int = 3, expandable: bool = False) -> int:
    """Returns the bytes that the allocator has taken from the device after some steps, fragmentation included.

    timeline: (number of an allocation, bytes; below zero where it is released), of which the first `begins_at` precede
    the step.
    """
    allocator, places = Allocator(expandable), {}
    timeline = list(timeline)
    for entry in (*timeline[:begins_at], *timeline[begins_at:] * steps):
        number, size = entry
        if size > 0:
            places[number] = allocator.take(size)
        elif number in places:
            allocator.give(places.pop(number))
    return allocator.reserved
