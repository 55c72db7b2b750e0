"""Counts the energy of a CPU's packages by RAPL, as Linux shows it; often root alone may read it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SECONDS = 1.0  # of steps; the counters move every millisecond


class Packages:
    """The packages of this machine. microjoules: of each, as its counter stands; None where it can't be read."""

    def __init__(self, root: Path = POWERCAP):
        self.zones = [zone for zone in sorted(root.glob("*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]

    def microjoules(self) -> list[int] | None:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self.zones] or None
        except (OSError, ValueError):
            return None

    def between(self, before: list[int], after: list[int]) -> float:
        """Joules of all packages from one reading to the next, within which a counter may have begun anew once."""
        ranges = [int((zone / "max_energy_range_uj").read_text()) + 1 for zone in self.zones]
        return sum((b - a) % most for a, b, most in zip(before, after, ranges, strict=True)) / 1e6

    def joules(self, step: Callable[[], object]) -> float | None:
        """Joules of a step, in the mean of some in a row, idle power included; None where none can tell."""
        if (before := self.microjoules()) is None:
            return None
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < SECONDS:
            step()
            count += 1
        after = self.microjoules()
        return None if after is None else self.between(before, after) / count
