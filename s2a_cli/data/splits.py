"""Draws class-balanced, seeded choices of images: validation and test splits, few-shot sets, fractions.

Images are drawn in the order of a hash of (purpose, seed, index), not by a random generator: the order is the same on
every platform and with every version of every library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import counted


def shuffled(indices: Sequence[int], seed: int, purpose: str) -> list[int]:
    """Returns `indices` in an order that depends on the seed and the purpose alone."""
    return sorted(indices, key=lambda index: blake2b(f"{purpose} {seed} {index}".encode(), digest_size=8).digest())


def hold_out(labels: Sequence[int], fraction: float, seed: int, purpose: str) -> tuple[list[int], list[int]]:
    """Splits the indices of `labels` into (kept, held out), both sorted, with `fraction` of each class held out.

    Of a class with two images or more at least one is held out and at least one kept. A single image is kept.
    """
    kept, held = [], []
    for members in _by_class(labels).values():
        count = min(max(_round(fraction * len(members)), 1), len(members) - 1)
        order = shuffled(members, seed, purpose)
        held += order[:count]
        kept += order[count:]
    return sorted(kept), sorted(held)


def few_shots(labels: Sequence[int], shots: int, seed: int, classes: Sequence[str]) -> list[int]:
    """Returns the indices of `shots` images of each class, sorted. Raises UserError where a class has fewer."""
    members = _by_class(labels)
    for label, name in enumerate(classes):
        if (count := len(members.get(label, []))) < shots:
            raise UserError(
                f"dataset.shots={shots}, but class {name!r} has {counted(count, 'training image')} "
                "once validation is split off; take fewer shots"
            )
    return sorted(index for of_class in members.values() for index in shuffled(of_class, seed, "shots")[:shots])


def share(labels: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Returns the indices of `fraction` of each class, at least one image a class, sorted."""
    chosen = []
    for members in _by_class(labels).values():
        chosen += shuffled(members, seed, "fraction")[: max(1, _round(fraction * len(members)))]
    return sorted(chosen)


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return members


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # round() makes 2.5 to 2 and 3.5 to 4
