"""Finds the fastest of the candidates whose predicted peak fits.

The largest micro-batch that fits in stock PyTorch is looked for first: all smaller ones fit as well. A larger one needs
blocks that keep less; for each mode it is given as few of them as do. Candidates are looked at in the order of the
least time that they could take, so that few peaks have to be predicted.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from s2a_cli.planner.candidates import EXACT, PLAIN, Candidate, Mode
from s2a_cli.planner.costs import Costs

MOST = 3  # plans of stock PyTorch, and exact ones without which no slower mode is looked at


@dataclass(frozen=True)
class Found:
    """A candidate that fits, the bytes that it needs and the seconds of its step."""

    candidate: Candidate
    needed: float
    seconds: float


class Room:
    """Tells what fits into a budget.

    needed: predicts the bytes of the device that a candidate needs; infinity for one that can't be run. sizes:
    micro-batches to choose from, the smallest first. total: blocks of the backbone. idle: the first of these, in which
    a mode changes nothing. like: weights by which those stored
    in another way are estimated: from one to the other a step needs so much more or less, whatever its activations.
    doubt: share of the budget; an estimate that is nearer to it is replaced by a prediction.
    """

    def __init__(
        self,
        needed: Callable[[Candidate], float],
        available: float,
        sizes: list[int],
        total: int,
        like: str | None = None,
        doubt: float = math.inf,
        idle: int = 0,
    ):
        self.available, self.sizes, self.total, self.like, self.doubt = available, sizes, total, like, doubt
        self.idle = idle
        known = functools.cache(needed)
        self.needed: Callable[[Candidate], float] = lambda candidate: known(_with_blocks(candidate, candidate.blocks))
        self.fitting = functools.cache(self._fitting)

    def fits(self, candidate: Candidate) -> bool:
        """Returns whether a candidate fits."""
        if candidate.micro_batch in self.sizes and candidate.blocks in (0, self.total):
            return candidate.micro_batch in self.fitting(replace(candidate, micro_batch=1))
        return self.needed(candidate) <= self.available

    def _fitting(self, candidate: Candidate) -> list[int]:
        """Returns the sizes at which a candidate fits, all of whose blocks are in its mode, or none."""
        below = bisect_right(self.sizes, self.available, key=lambda n: self.line(replace(candidate, micro_batch=n)))

        def needed(size: int) -> float:
            one = replace(candidate, micro_batch=size)
            estimated = self.line(one)
            sure = abs(estimated - self.available) > self.doubt * self.available
            return estimated if sure else self.needed(one)

        return self.sizes[: how_many(needed, self.sizes, self.available, below - 1)]

    def line(self, candidate: Candidate) -> float:
        """Estimates what a candidate needs, from both ends of the sizes and of the blocks: memory is almost a line."""
        if 0 < candidate.blocks < candidate.total:
            share = max(0, candidate.blocks - self.idle) / (candidate.total - self.idle)
            plain, whole = (self.line(_with_blocks(candidate, blocks)) for blocks in (0, candidate.total))
            return plain + share * (whole - plain)
        if (more := self._beside(candidate)) is not None:
            return self.line(replace(candidate, weights=self.like)) + more
        least, most = self.sizes[0], self.sizes[-1]
        low, high = (self.needed(replace(candidate, micro_batch=size)) for size in (least, most))
        return low + (high - low) * (candidate.micro_batch - least) / max(most - least, 1)

    def _beside(self, candidate: Candidate) -> float | None:
        """Returns what a candidate needs more than with weights as `like`; None where it is not estimated by them."""
        if self.like is None or candidate.weights in (None, self.like):
            return None
        own, other = (self.needed(Candidate(self.sizes[0], weights=name)) for name in (candidate.weights, self.like))
        return own - other if math.isfinite(own) and math.isfinite(other) else None

    def guessed(self, candidate: Candidate) -> Candidate:
        """Returns the candidate with as few blocks in its mode as are estimated to fit, at least one."""
        plain, whole = (self.line(_with_blocks(candidate, blocks)) for blocks in (0, self.total))
        share = (plain - self.available) / max(plain - whole, 1.0)
        blocks = self.idle + math.ceil(share * (self.total - self.idle))
        return replace(candidate, blocks=min(max(blocks, self.idle + 1), self.total))

    def fewest(self, candidate: Candidate) -> Candidate | None:
        """Returns the candidate with as few blocks in its mode as fit; None where it does not fit with all."""
        others = range(self.total - self.idle)  # blocks that are not in the mode
        fitting = how_many(
            lambda count: self.needed(replace(candidate, blocks=self.total - count)),
            others,
            self.available,
            self.total - candidate.blocks,
        )
        return replace(candidate, blocks=self.total - others[fitting - 1]) if fitting else None


def _with_blocks(candidate: Candidate, blocks: int) -> Candidate:
    """Returns a candidate with so many blocks in its mode; without any, it is stock PyTorch whatever the mode."""
    stock = not blocks or candidate.mode == PLAIN
    return Candidate(candidate.micro_batch, weights=candidate.weights) if stock else replace(candidate, blocks=blocks)


@dataclass(frozen=True)
class Slower:
    """A mode that was not looked at further: no step in it can be shorter than what others take."""

    candidate: Candidate  # the fastest that there could be
    seconds: float


def plans(
    room: Room, costs: Costs, batch: int, modes: Iterable[Mode], weights: tuple[str | None, ...] = (None,)
) -> tuple[list[Found], list[Slower]]:
    """Returns what fits, fastest first and of equally fast ones the smallest, and modes that are slower whatever fits.

    batch: images of a step. weights: ways to store frozen weights; None is as they are. What leaves the gradient as it
    is comes first, the fastest of each mode, while it may be among the best `MOST`. The rest has to be faster than all
    of that.
    """
    found: list[Found] = []
    slower: list[Slower] = []
    kinds = [(Candidate(1, mode, room.total, room.total, stored), mode, stored) for stored in weights for mode in modes]
    # Stock PyTorch with all weights first: what is slower than its plans is left out before its peaks are predicted.
    for candidate, mode, stored in sorted(kinds, key=lambda kind: (-kind[0].fidelity, kind[1] != PLAIN)):
        exact = sorted(one.seconds for one in found if one.candidate.fidelity == EXACT)
        best = exact[: 1 if candidate.fidelity < EXACT else MOST]
        limit = best[-1] if (candidate.fidelity < EXACT and best) or len(best) == MOST else math.inf
        for one in _of_mode(room, costs, batch, mode, stored, limit):
            (found if isinstance(one, Found) else slower).append(one)  # pyright: ignore[reportArgumentType]
    return sorted(found, key=lambda one: (one.seconds, one.needed)), slower


def _of_mode(
    room: Room, costs: Costs, batch: int, mode: Mode, weights: str | None, limit: float
) -> list[Found] | list[Slower]:
    """Returns the fastest plan of a mode, in stock PyTorch the fastest three; a Slower where all are above a limit."""

    def found(candidate: Candidate) -> Found:
        return Found(candidate, room.needed(candidate), costs.step(candidate, batch))

    plain = room.fitting(Candidate(1, weights=weights))
    if mode == PLAIN:
        sizes = [Candidate(size, weights=weights) for size in plain]
        fastest = sorted(sizes, key=lambda one: costs.step(one, batch))
        if fastest and costs.step(fastest[0], batch) >= limit:
            return [Slower(fastest[0], costs.step(fastest[0], batch))]
        known = (found(one) for one in fastest if costs.step(one, batch) < limit)
        return list(islice((one for one in known if one.needed <= room.available), MOST))
    if mode not in costs.extra:  # with all blocks in it, it did not fit where it was to be measured
        return []
    everywhere = Candidate(1, mode, room.total, room.total, weights)
    guesses: dict[Candidate, float] = {}
    for size in room.sizes:
        whole = replace(everywhere, micro_batch=size)
        if costs.more(mode, size) < 0:  # it is faster than stock PyTorch: the more blocks, the better
            guesses[whole] = costs.step(whole, batch)
        elif size not in plain:
            guess = room.guessed(whole)
            guesses[guess] = costs.step(replace(guess, blocks=max(1, guess.blocks - 1)), batch)
    best: Found | None = None
    for guess in sorted(guesses, key=guesses.__getitem__):  # by the time with a block less than is estimated
        if guesses[guess] >= (best.seconds if best else limit):
            return [best] if best else [Slower(guess, guesses[guess])]
        if guess.micro_batch not in room.fitting(everywhere):
            continue
        fitting = guess if costs.more(mode, guess.micro_batch) < 0 else room.fewest(guess)
        if not fitting or room.needed(fitting) > room.available:
            continue
        if best is None or costs.step(fitting, batch) < best.seconds:
            best = found(fitting)
    return [best] if best else []


def how_many(needed: Callable[[int], float], values: Sequence[int], available: float, guess: int) -> int:
    """Returns for how many of some ascending values needed(value) <= available, which holds up to one and not behind.

    guess: the index of that one, which a good guess finds with two calls.
    """
    low, high, step = -1, len(values), 1
    at = min(max(guess, 0), high - 1)
    while high - low > 1:
        if needed(values[at]) <= available:
            low, ahead = at, at + step
        else:
            high, ahead = at, at - step
        step *= 2
        at = ahead if low < ahead < high else (low + high) // 2
    return low + 1


def largest(needed: Callable[[int], float], available: float, most: int, least: int = 1, first: int = 32) -> int:
    """Returns the largest count from `least` to `most` for which needed(count) <= available, 0 if there is none.

    Each guess is where a straight line through the last two would end, so that few calls do: memory is almost one.
    """
    low, at_low = least, needed(least)
    if at_low > available:
        return 0
    high, at_high = most + 1, None  # too many, as far as is known
    guess = min(max(first, least + 1), most)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = needed(guess)
        slope = max((found - at_low) / (guess - low), 1.0)
        if found <= available:
            low, at_low = guess, found
            ahead = int((available - found) / slope)
            guess = low + max(1, ahead)
        else:
            high, at_high = guess, found
            guess = low + int((available - at_low) / slope)
        if at_high is not None and high - low > 8 and not low < guess < high:
            guess = (low + high) // 2
    return low
