"""How methods and quants look: the same in all figures of a page, and no two of them alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

# Readable on white and on black (after Okabe & Ito).
COLORS = ("#3b8fd0", "#e0702f", "#27a074", "#c263a0", "#b8941c", "#7c7cf0", "#d6504c", "#4aa8b8", "#8a8a8a", "#9b6a3c")
TAILS = (None, (1, 1), (1, -1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))  # the last two as error bars lie
MARKERS = "osD^vP*Xph<>"
DASHES = ("-", "--", ":", "-.")
SIZE = 6.0  # points of a mark


@dataclass(frozen=True)
class Looks:
    """Colour and tail by method, 90 of them; shape of the mark and dashes of the line by quant."""

    methods: list[str]
    quants: list[str]

    @classmethod
    def of(cls, methods: Iterable[str], quants: Iterable[str]) -> Looks:
        return cls(sorted(set(methods)), sorted(set(quants)))

    def color(self, method: str) -> str:
        return COLORS[self.methods.index(method) % len(COLORS)]

    def dashes(self, quant: str) -> str:
        return DASHES[self.quants.index(quant) % len(DASHES)]

    def shape(self, quant: str) -> str:
        return MARKERS[self.quants.index(quant) % len(MARKERS)]

    def mark(self, method: str, quant: str | None = None) -> dict[str, Any]:
        """Returns colour, marker and its size for matplotlib; without a quant the mark is a circle."""
        color, shape = self.color(method), "o" if quant is None else self.shape(quant)
        tail = TAILS[self.methods.index(method) // len(COLORS) % len(TAILS)]
        if tail is None:
            return {"color": color, "marker": shape, "ms": SIZE}
        plain = MarkerStyle(shape)
        path = Path.make_compound_path(plain.get_path().transformed(plain.get_transform()), Path([(0, 0), tail]))
        return {"color": color, "marker": path, "ms": 2 * SIZE}  # matplotlib scales a path to its tail, twice as far
