"""Measures on this device what the costs of plans (costs.py) are made of.

Whole passes tell most where they are fast. A large model on a CPU takes a second for an image: in the time that there
is, few passes run, and noise is more than what is between two plans. There single blocks are timed (blocks.py), in each
mode and several sizes, several times in turn, and of whole passes only some of the smallest size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

from s2a_cli.planner.blocks import Blocks, kinds_of
from s2a_cli.planner.candidates import PLAIN, Candidate, Mode
from s2a_cli.planner.costs import RECOMPUTED_EXTRA, Costs
from s2a_cli.planner.timer import Timer
from s2a_cli.training.step import moving_norms

SECONDS = 11.0  # for all whole passes together, but for the first of each kind
SHORT_RUN = 0.05  # of what a run is expected to take: where that is less, measurements take no more than it
LEAST = 1.0  # second for whole passes in any run: nothing is known of sizes beyond those that were measured

SLOW = 0.05  # seconds: where a CPU takes less for a pass of the smallest size, whole passes are timed
PASSES = 3  # of the smallest size that are timed besides blocks
OF_A_KIND = 2  # blocks at least, on average: else one of each kind takes almost as long as a pass
BLOCK_SECONDS = 16.0  # for all blocks together: few whole passes of finalists follow
BLOCK_ROUNDS = 8  # in which blocks are timed once more, while there is time
CLOSE = 0.1  # of the time of an image: what takes more than the fastest that fits by more is timed in one round alone
FEWEST_ROUNDS = 2  # for which a larger micro-batch must leave time
NEAR = 0.15  # of the time of what fits first: a mode that takes more is timed in the smallest micro-batch alone
BLOCK_NOISE = 0.01  # of a pass: a mode whose blocks are faster than in stock PyTorch by less is taken to be as fast

ROUNDS = 3  # in which all passes are timed once more, while there is time
MODE_IMAGES = 4  # at most, that all modes are measured with; fewer where that would take longer than MODE_SECONDS
MODE_SECONDS = 4.0
MOST_OF_REST = 20  # a larger micro-batch of a mode is measured where it takes no more than this part of the time left
NOISE = 0.05  # as BLOCK_NOISE, of whole passes


def measure(
    timer: Timer, sizes: list[int], modes: Iterable[Mode], fits: Callable[[Candidate], bool], run: float = math.inf
) -> Costs:
    """Returns the costs of micro-batches of these sizes, which ascend, in stock PyTorch and in modes.

    fits: whether a candidate's predicted peak fits the device; others are not run. run: images that the run trains on,
    in all its epochs.

    Blocks are timed by themselves on a CPU that takes long for a pass, where they are alike and one stands for its part
    of a pass. A GPU computes one block while the host launches the next.
    """
    modes, at, total = list(modes), sizes[0], len(timer.attached.blocks)
    if timer.device.type == "cpu" and timer.blocks and not moving_norms(timer.attached.model):
        first = next(filter(fits, (_everywhere(mode, at, total) for mode in dict.fromkeys((PLAIN, *modes)))), None)
        kinds = kinds_of(timer, first, at) if first else None
        if first and kinds and OF_A_KIND * len(kinds) <= len(timer.blocks):
            seconds = min(filter(None, (timer(first, at) for _ in range(PASSES))), default=0.0)
            most = min(BLOCK_SECONDS, SHORT_RUN * run * seconds / at)
            blocks = Blocks(timer, kinds)
            if seconds > SLOW and (costs := measure_blocks(blocks, first.mode, seconds, sizes, modes, fits, most)):
                return costs
    return measure_passes(timer, sizes, modes, fits, run)


def measure_blocks(
    blocks: Blocks,
    first: Mode,
    whole: float,
    sizes: list[int],
    modes: Iterable[Mode],
    fits: Callable[[Candidate], bool],
    most: float = BLOCK_SECONDS,
) -> Costs | None:
    """Returns the costs that follow from the times of single blocks; None where the device has not the memory for one.

    whole: seconds of a pass of sizes[0] images with all blocks in the mode `first`, which fits. What it takes beside
    its blocks is taken to grow with the images, and to be the same in all modes. fits: as of `measure`; a block in a
    mode needs less than a pass with all blocks in it, and less than any pass where images are the fewest. most: seconds
    for all.
    """
    at, spent, total = sizes[0], PASSES * whole, blocks.total
    best: dict[Mode, dict[int, float]] = {}  # by images: the least seconds of all blocks

    def take(mode: Mode, images: int) -> None:
        nonlocal spent
        begun = time.monotonic()
        if (seconds := blocks(mode, images)) is not None:
            best.setdefault(mode, {})[images] = seconds
        spent += time.monotonic() - begun

    for mode in 2 * list(dict.fromkeys((PLAIN, first, *modes))):
        if mode in (PLAIN, first) or spent < most:
            take(mode, at)
    if not {PLAIN, first} <= best.keys():
        return None
    near = [mode for mode, found in best.items() if found[at] <= (1 + NEAR) * best[first][at]]
    for before, images in pairwise(sizes):
        near = [mode for mode in near if before in best[mode] and fits(_everywhere(mode, images, total))]
        ahead = sum(blocks.turn(mode, before) / before * images for mode in near)
        again = sum(blocks.turn(mode, size) for mode, found in best.items() for size in found)
        # Of one size alone nothing would be known of larger ones, not even in a short run.
        if not near or (before != at and spent + ahead + FEWEST_ROUNDS * (ahead + again) > most):
            break
        for mode in near:
            take(mode, images)
    every = [(mode, images) for mode, found in best.items() for images in found]
    fitting = [one for one in every if fits(_everywhere(*one, total))]
    for number in range(BLOCK_ROUNDS):
        an_image = {(mode, images): best[mode][images] / images for mode, images in every}
        most_close = (1 + CLOSE) * min((an_image[one] for one in fitting), default=math.inf)
        close = {one for one in every if number == 0 or an_image[one] <= most_close}
        for mode, images in every:
            as_stock = mode == PLAIN and any(size == images for _, size in close)  # which modes are compared with
            if ((mode, images) in close or as_stock) and spent + blocks.turn(mode, images) < most:
                take(mode, images)
    beside = max(0.0, whole - best[first][at]) / at  # seconds of an image
    costs = Costs({n: n * beside + seconds for n, seconds in best[PLAIN].items()}, blocks.shares(PLAIN, at), {})
    for mode, found in best.items():
        if mode != PLAIN:
            passes = {n: n * beside + seconds for n, seconds in found.items()}
            costs.extra[mode] = _extra(costs, mode, passes, BLOCK_NOISE)
    return costs


def _everywhere(mode: Mode, images: int, total: int) -> Candidate:
    """Returns the candidate of so many images with all blocks in a mode."""
    return Candidate(images) if mode == PLAIN else Candidate(images, mode, total, total)


def _extra(costs: Costs, mode: Mode, passes: dict[int, float], noise: float) -> dict[int, float]:
    """Returns by images what passes in a mode take more than in stock PyTorch, as a share.

    0 where they seem to take less, by no more than noise or against all reason.
    """
    found = {n: seconds / costs.micro_batch(Candidate(n), n) - 1 for n, seconds in passes.items()}
    return {n: 0.0 if -noise < more < 0 or (mode.recomputes and more < 0) else more for n, more in found.items()}


def measure_passes(
    timer: Timer, sizes: list[int], modes: Iterable[Mode], fits: Callable[[Candidate], bool], run: float = math.inf
) -> Costs:
    """Times micro-batches of the smaller of these sizes, which ascend, in stock PyTorch, and modes at some of them.

    fits and run are as of `measure`. Where stock PyTorch does not fit with one image, its time is that of the first
    mode that does, less what is assumed to be computed a second time.
    """
    most, spent, total = SECONDS, 0.0, max(1, len(timer.attached.blocks))
    best: dict[tuple[Candidate, int], float] = {}

    def take(candidate: Candidate, images: int) -> float | None:
        """Returns the seconds of one micro-batch and keeps the least, nearest to what an undisturbed device does."""
        nonlocal spent
        begun = time.monotonic()
        if (found := timer(candidate, images)) is not None:
            best[candidate, images] = min(found, best.get((candidate, images), found))
        spent += time.monotonic() - begun
        return found

    stock: list[int] = []
    for images in sizes:
        # So many images take as long as all sizes before them together; modes want their part of the time, too.
        ahead = images / stock[-1] * best[Candidate(stock[-1]), stock[-1]] if stock else 0.0
        if ahead > (most - spent) / 2 or not fits(Candidate(images)):
            break
        if not stock:
            take(Candidate(images), images)  # the first pass of a process waits for what later ones find ready
        if (seconds := take(Candidate(images), images)) is None:
            break
        most = min(most, max(LEAST, SHORT_RUN * run * seconds / images))
        stock.append(images)
    modes = [mode for mode in modes if mode != PLAIN]
    few = [n for n in stock if n <= MODE_IMAGES and 2 * len(modes) * best[Candidate(n), n] <= MODE_SECONDS]
    at = max(few, default=min(sizes))
    known: dict[Mode, list[int]] = {}
    for mode in modes:
        candidate = Candidate(at, mode, total, total)
        if known and spent > most:
            break
        # What keeps less than stock PyTorch fits where that does. The first pass fits codes to what it sees.
        if (stock or fits(candidate)) and take(candidate, at) and take(candidate, at):
            known[mode] = [at]
    for mode, images in ((mode, images) for images in sizes if images > at for mode in known):
        candidate = Candidate(at, mode, total, total)
        whole = replace(candidate, micro_batch=images)
        ahead = images / at * best[candidate, at]
        if ahead < (most - spent) / MOST_OF_REST and fits(whole) and take(candidate, images):
            known[mode].append(images)
    shares = timer.shares(at)
    for _ in range(ROUNDS):
        for candidate, images in list(best):
            if spent + best[candidate, images] < most:
                take(candidate, images)
    found = {images: best[Candidate(images), images] for images in stock}
    if not found and known:
        found[at] = best[Candidate(at, next(iter(known)), total, total), at] / (1 + RECOMPUTED_EXTRA)
    costs = Costs(found or {at: float(at)}, shares, {})
    for mode, tried in known.items():
        passes = {images: best[Candidate(at, mode, total, total), images] for images in tried}
        costs.extra[mode] = _extra(costs, mode, passes, NOISE)
    return costs
