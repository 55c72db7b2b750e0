"""Draws class-balanced, seeded choices of images: validation and test splits, few-shot sets, fractions.

Images are drawn in the order of a hash of (purpose, seed, index), not by a random generator: the order is the same on
every platform and with every version of every library.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import counted

UNLABELLED = -1  # stands for the class of the images that have no label


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


def hold_out_groups(
    labels: Sequence[Sequence[int]], groups: Sequence[str] | None, fraction: float, seed: int, purpose: str
) -> tuple[list[int], list[int]]:
    """Splits the indices of `labels` into (kept, held out), both sorted, and keeps the images of a group together.

    labels: those of each image. groups: what each image is of; None: each is a group of its own. The rarest class is
    dealt out first, its largest groups first, each to the side that lacks more of its images of `fraction` (iterative
    stratification, Sechidis et al. 2011, over groups). Of a class that two groups have each side gets one where the
    other labels of these groups allow it; a class of a single group is kept.
    """
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(range(len(labels)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    units = list(members.values())
    counts = [Counter(label for index in unit for label in labels[index] or [UNLABELLED]) for unit in units]
    total = sum(counts, Counter[int]())
    lacking = [{label: part * count for label, count in total.items()} for part in (1 - fraction, fraction)]
    waiting: dict[int, list[int]] = {label: [] for label in total}
    order = shuffled(range(len(units)), seed, purpose)
    for unit in sorted(order, key=lambda unit: -len(units[unit])):
        for label in counts[unit]:
            waiting[label].append(unit)
    left = {label: len(of_class) for label, of_class in waiting.items()}
    single = {label for label, number in left.items() if number == 1}
    sides: tuple[list[int], list[int]] = ([], [])  # kept, held out
    present: tuple[set[int], set[int]] = (set(), set())
    dealt: set[int] = set()
    while waiting:
        label = min(waiting, key=lambda label: (left[label], label))
        for unit in waiting.pop(label):
            if unit in dealt:
                continue
            side = 0 if lacking[0][label] >= lacking[1][label] or label in single else 1
            if left[label] == 1 and label not in single and (missing := [s for s in (0, 1) if label not in present[s]]):
                side = missing[0]
            sides[side].extend(units[unit])
            dealt.add(unit)
            for other, count in counts[unit].items():
                lacking[side][other] -= count
                left[other] -= 1
                present[side].add(other)
    return sorted(sides[0]), sorted(sides[1])


def few_shots(labels: Sequence[Any], shots: int, seed: int, classes: Sequence[str]) -> list[int]:
    """Returns the indices of `shots` images of each class, sorted. Raises UserError where a class has fewer.

    Where images have several labels, an image that one class needs counts for its other classes as well.
    """
    members = _by_class(labels)
    for label, name in enumerate(classes):
        if (count := len(members.get(label, []))) < shots:
            raise UserError(
                f"dataset.shots={shots}, but class {name!r} has {counted(count, 'training image')} "
                "once validation is split off; take fewer shots"
            )
    chosen: set[int] = set()
    for of_class in members.values():
        there = len(chosen.intersection(of_class))
        order = (index for index in shuffled(of_class, seed, "shots") if index not in chosen)
        chosen.update(islice(order, max(0, shots - there)))
    return sorted(chosen)


def share(labels: Sequence[Any], fraction: float, seed: int) -> list[int]:
    """Returns the indices of `fraction` of each class, at least one image a class, sorted.

    Where images have several labels, at least this much of each class.
    """
    chosen: set[int] = set()
    for members in _by_class(labels).values():
        there = len(chosen.intersection(members))
        order = (index for index in shuffled(members, seed, "fraction") if index not in chosen)
        chosen.update(islice(order, max(0, max(1, _round(fraction * len(members))) - there)))
    return sorted(chosen)


def _by_class(labels: Sequence[Any]) -> dict[int, list[int]]:
    """Returns class -> the images that have it."""
    members: dict[int, list[int]] = {}
    for index, of_image in enumerate(labels):
        for label in of_image if isinstance(of_image, tuple) else (of_image,):
            members.setdefault(label, []).append(index)
    return members


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # round() makes 2.5 to 2 and 3.5 to 4
