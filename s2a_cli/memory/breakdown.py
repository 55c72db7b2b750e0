"""Tells where the memory of a step is: at the peak, by use, operator family and place, and over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2a_cli.memory.allocator import reserved
from s2a_cli.memory.families import FAMILIES, family, keeps_result
from s2a_cli.memory.result import Memory
from s2a_cli.memory.watch import USES

if TYPE_CHECKING:
    from s2a_cli.memory.tracker import Allocation, Call, Tracker
    from s2a_cli.memory.watch import Watch


@dataclass(frozen=True)
class Part:
    """Counts bytes of one use, family and place that are alive at the peak."""

    use: str  # weights | trainable | optimiser | buffers | gradients | batch | kept | transient
    family: str  # of the operator that keeps it for the backward pass, or made it; of the layer, for weights
    place: str  # in the model: a block, another child, or "loss and update"
    bytes: int


@dataclass(frozen=True)
class Profile:
    """Holds one training step, predicted or counted on real tensors of the CPU, in bytes of CUDA's allocator."""

    memory: Memory
    parts: tuple[Part, ...]  # what is alive at the peak; they add up to it to the byte
    place: str  # what runs when the peak is reached
    uses: tuple[str, ...]  # of each allocation, by its number
    # (number of the allocation, bytes): it comes, or goes where bytes are below zero
    timeline: tuple[tuple[int, int], ...]
    begins_at: int  # entries of the timeline with what is there before the step
    peak_at: int  # entries of the timeline up to the peak
    phases: tuple[tuple[int, str], ...]  # (entry of the timeline, forward | backward | update), in order
    calls: tuple[Call, ...]
    operators: int  # dispatched in the step, those apart that launch no kernel
    graphs: bool = False  # whether its passes are replayed as CUDA graphs, from a pool of their own

    @property
    def peak_bytes(self) -> int:
        """The bytes that are alive at the peak."""
        return sum(part.bytes for part in self.parts)

    def reserved_bytes(self, expandable: bool = False) -> int:
        """Returns what PyTorch's allocator takes from the device for such steps, by a simulation of it.

        expandable: with expandable segments.
        """
        known = self.__dict__.setdefault("_reserved", {})
        if expandable not in known:
            known[expandable] = reserved(self.timeline, self.begins_at, expandable=expandable)
        return known[expandable] + (self.unshared_bytes if self.graphs else 0)

    @property
    def unshared_bytes(self) -> int:
        """What more the step takes where its update can't use what its passes leave, as beside a CUDA graph's pool."""
        live, phase, most, before = 0, "", {"passes": 0, "update": 0}, 0
        starts = dict(self.phases)
        for at, (_, size) in enumerate(self.timeline):
            if starts.get(at) == "update":
                before = live
            phase, live = starts.get(at, phase), live + size
            kind = "update" if phase == "update" else "passes"
            most[kind] = max(most[kind], live)
        return max(0, min(most.values()) - before)

    @property
    def phase(self) -> str:
        """Returns the phase of the step that the peak is in."""
        return next((name for start, name in reversed(self.phases) if start < self.peak_at), "forward")

    def by(self, *keys: str, uses: Iterable[str] = USES) -> dict[tuple[str, ...], int]:
        """Returns the bytes at the peak by some of use, family and place, the largest first."""
        found: Counter[tuple[str, ...]] = Counter()
        for part in self.parts:
            if part.use in uses:
                found[tuple(getattr(part, key) for key in keys)] += part.bytes
        return dict(found.most_common())

    @classmethod
    def of(cls, memory: Memory, tracker: Tracker, watch: Watch) -> Profile:
        """Returns the profile of a step that is over, from its records."""
        born = {id(allocation) for allocation, came in tracker.events if came}
        gone = (allocation for allocation, came in tracker.events if not came)
        before = {id(allocation): allocation for allocation in (*tracker.alive(), *gone) if id(allocation) not in born}
        events = [*((allocation, True) for allocation in before.values()), *tracker.events]
        peak_at = len(before) + tracker.peak_at
        numbers: dict[int, int] = {}
        alive: dict[int, Allocation] = {}
        uses: list[str] = []
        timeline = []
        for at, (allocation, came) in enumerate(events):
            number = numbers.setdefault(id(allocation), len(numbers))
            if came:
                uses.append(allocation.use or "transient")
            if at < peak_at and came:
                alive[number] = allocation
            elif at < peak_at:
                del alive[number]
            timeline.append((number, allocation.bytes if came else -allocation.bytes))
        sums: Counter[tuple[str, str, str]] = Counter()
        for allocation in alive.values():
            sums[allocation.use or "transient", _family(allocation), allocation.place] += allocation.bytes
        parts = sorted(
            (Part(*key, size) for key, size in sums.items()), key=lambda part: (USES.index(part.use), -part.bytes)
        )
        return cls(
            memory,
            tuple(parts),
            events[peak_at - 1][0].place,
            tuple(uses),
            tuple(timeline),
            len(before),
            peak_at,
            tuple((len(before) + at, phase) for at, phase in watch.phases),
            tuple(tracker.calls),
            tracker.operators,
        )


def _family(allocation: Allocation) -> str:
    """Returns the family of the operator that keeps an allocation, as far as reading and writing it tells.

    Of what is not kept: that of the operator that made it.
    """
    made = family(allocation.operator)
    if allocation.use != "kept":
        return made
    found = [*allocation.readers, *([made] if keeps_result(allocation.operator) else [])]
    return min(found, key=FAMILIES.index, default=made)
