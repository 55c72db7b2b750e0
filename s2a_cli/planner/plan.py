"""Plans the steps of a run for a budget: the fastest settings whose predicted peak fits.

Peaks are predicted, times are measured on this device (measure.py), and a search finds what fits (search.py).
Candidates that leave the gradient as it is come first: one that does not is taken only where it is faster than all of
them, and where its gradient on the run's first images is as near to the exact one as `fidelity=` asks for. The best
three are then timed side by side where the device is fast enough for that to tell more, and the fastest is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.config.settings import plain
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.planner.candidates import EXACT, FIDELITY, PLAIN, WEIGHTS, Candidate, Mode
from s2a_cli.planner.fidelity import Fidelity
from s2a_cli.planner.measure import SHORT_RUN, measure
from s2a_cli.planner.search import Found, Room, Slower, plans
from s2a_cli.planner.task import Task
from s2a_cli.planner.timer import Timer, Timers
from s2a_cli.results import record
from s2a_cli.training.step import Batch

DOUBT = 0.1  # of the budget: what is estimated to be nearer to it is predicted; so is all that is taken
FINALISTS = 3
FINAL_SECONDS = 8.0  # for the finalists together
TURNS = 5  # of each finalist, alternating
FEWEST_TURNS = 2
TIE = 0.01  # of a step: by less no measurement tells two plans apart
SHOWN = 8  # alternatives


class NothingFits(UserError):
    """No plan of a task fits its budget."""


@dataclass
class Contender:
    """A plan that fits, what was measured of it, and why it is taken or not."""

    found: Found
    why: str = ""
    fidelity: float | None = None  # measured
    seconds: float | None = None  # of a step, timed

    @property
    def candidate(self) -> Candidate:
        return self.found.candidate

    @property
    def step_seconds(self) -> float:
        """The seconds of a step, timed or else predicted."""
        return self.found.seconds if self.seconds is None else self.seconds

    def micro_batch_seconds(self, batch: int) -> float:
        """Returns the predicted seconds of a micro-batch of a step of so many images."""
        return self.found.seconds * self.candidate.micro_batch / batch

    def choice(self, task: Task) -> record.Choice:
        """Returns what the record of a run says about it."""
        return {
            "about": self.candidate.describe(task.batch),
            "words": task.words(self.candidate),
            "needed_mib": round(self.found.needed / MIB, 1) if math.isfinite(self.found.needed) else None,
            "predicted_seconds": _rounded(self.found.seconds),
            "measured_seconds": _rounded(self.seconds),
            "fidelity": self.fidelity,
            "why": self.why,
        }


def make(
    task: Task,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    stored: Callable[[str | None], Attachment],
    nothing: Callable[[float], str],
    is_real: bool = True,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    read: Callable[[Attachment, Tensor], Batch] = lambda attached, images: images,
) -> record.Plan:
    """Returns the plan of a task. Raises NothingFits where nothing does.

    batch: images [B, 3, H, W] and targets [B]. read: returns what an attachment trains on in place of images. stored:
    returns the attachment with weights stored so; None and "fp32" are as they are. nothing: says what would fit, for
    the least bytes that a candidate needs. is_real: whether weights and images are those of the run; otherwise no
    gradients are compared, and the times of the costs stand.
    """
    begun, level = time.monotonic(), FIDELITY[task.config.fidelity]
    modes, weights, smallest = task.modes(level), task.weights(level), task.smallest(level)
    room = task.room(weights[0], DOUBT)
    fitting = [
        name
        for name in weights
        if any(room.needed(one) <= room.available for one in smallest if one.weights == name)  # few are asked for
    ]
    if not fitting:
        raise NothingFits(nothing(min(map(room.needed, smallest))))
    base = fitting[0]  # exact, if any is
    exact = base if WEIGHTS[base or "fp32"] == EXACT else None
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("planning", None, " micro-batches"))
        (images, targets), common = batch, (device, progress, criterion)

        def timer(name: str | None) -> Timer:
            attached = stored(name)
            return Timer(task.timed(name), attached, (read(attached, images), targets), *common)

        timers = stack.enter_context(closing(Timers(timer)))
        costs = measure(
            timers[base],
            _halvings(room.sizes),
            modes,
            lambda one: room.fits(replace(one, weights=base)),
            task.run_images,
        )
        for name in filter(None, fitting[1:]):
            if task.runs_blocks:
                costs.add_weights(name, timers[name], room.fits, least=0.0 if base in (None, "fp32") else -math.inf)
            else:
                costs.weights[name] = 0.0  # they are read when features are kept, and in no step
        cosine = Fidelity(timers, exact) if is_real else None
        found, slower = plans(room, costs, task.batch, modes, tuple(fitting))
        contenders = list(map(Contender, found))
        finalists = _finalists(contenders, level, cosine)
        if not finalists:
            raise NothingFits(nothing(min(map(room.needed, smallest))))
        if is_real and len(finalists) > 1:
            run = finalists[0].found.seconds / task.batch * task.run_images
            _time(finalists, timers, task.batch, min(FINAL_SECONDS, SHORT_RUN * run))
    best = _best(finalists)
    contenders += [Contender(Found(one.candidate, math.inf, one.seconds), _too_slow(one, best)) for one in slower]
    _explain(best, contenders)
    rest = sorted((c for c in contenders if c is not best), key=lambda c: c.step_seconds)
    settings = task.settings(best.candidate)
    return {
        "settings": settings,
        "asked": {key: _plain(OmegaConf.select(task.config, key)) for key in settings},
        "available_mib": round(task.available / MIB, 1),
        "batch": task.batch,
        "device": str(device),
        "seconds": round(time.monotonic() - begun, 1),
        "choices": [c.choice(task) for c in (best, *rest[:SHOWN])]
        + _left_out(task, room, contenders, level, costs.extra),
    }


def _finalists(
    contenders: list[Contender], level: float, cosine: Callable[[Candidate], float] | None
) -> list[Contender]:
    """Returns those that are timed: the fastest exact one, and others of which each may be the fastest of all."""
    exact = [one for one in contenders if one.candidate.fidelity == EXACT]
    found = exact[:1]
    for one in contenders:
        if one.candidate.fidelity == EXACT or len(found) == FINALISTS:
            continue
        if exact and one.found.seconds >= exact[0].found.seconds:
            one.why = "its gradient is rounded, and it is no faster than an exact plan"
        elif cosine and (fidelity := round(cosine(one.candidate), 5)) < level:
            one.fidelity, one.why = fidelity, f"the cosine of its gradient, {fidelity:.4f}, is below {level:g}"
        else:
            one.fidelity = fidelity if cosine else None
            found.append(one)
    return [*found, *exact[1 : 1 + FINALISTS - len(found)]]


def _time(finalists: list[Contender], timers: Mapping[str | None, Timer], batch: int, most: float) -> None:
    """Times some micro-batches of each finalist in turn, and notes the seconds of a step.

    most: seconds for all of them. Where these do not suffice for `FEWEST_TURNS` of each, as on a device that others
    use, all keep their predictions, which are made of more and shorter measurements.
    """
    if len(finalists) * FEWEST_TURNS * max(one.micro_batch_seconds(batch) for one in finalists) > most:
        return
    turn_of = {id(one): min(most / len(finalists) / TURNS, one.found.seconds) for one in finalists}
    rates: dict[int, list[float]] = {id(one): [] for one in finalists}
    until = time.monotonic() + most
    for turn in range(TURNS):
        for one in finalists:
            timer, images, seconds = timers[one.candidate.weights], 0, 0.0
            while seconds < turn_of[id(one)] and (turn == 0 or time.monotonic() < until or not images):
                took = timer(one.candidate, one.candidate.micro_batch)
                if took is None:
                    one.why = "the device had not the memory"
                    break
                images, seconds = images + one.candidate.micro_batch, seconds + took
            if images:
                rates[id(one)].append(seconds / images)
        if time.monotonic() > until:
            break
    left = [one for one in finalists if not one.why]
    if all(len(rates[id(one)]) >= FEWEST_TURNS for one in left):
        for one in left:
            one.seconds = batch * min(rates[id(one)])  # of several the least is nearest to an undisturbed device


def _best(finalists: list[Contender]) -> Contender:
    """Returns the one with the shortest step, of the timed ones where there are some.

    Of equally fast ones those that leave the gradient as it is go first, of these stock PyTorch, then the smallest.
    Raises UserError without any.
    """
    left = [one for one in finalists if not one.why]
    if not left:
        raise UserError("budget: what was predicted to fit does not, on this device now; others may be using it")
    timed = [one for one in left if one.seconds is not None] or left
    least = min(one.step_seconds for one in timed)
    alike = [one for one in timed if one.step_seconds <= (1 + TIE) * least]
    return min(alike, key=lambda one: (-one.candidate.fidelity, one.candidate.mode != PLAIN, one.found.needed))


def _too_slow(one: Slower, best: Contender) -> str:
    """Says why a mode was not looked at further."""
    if one.candidate.fidelity < EXACT:
        return "its gradient is rounded, and in no way faster than an exact plan"
    return f"at least {one.seconds / best.found.seconds:.2f} times the seconds with one block"


def _explain(best: Contender, contenders: Iterable[Contender]) -> None:
    """Notes why each contender is not taken, where that has not been said, and why one is."""
    rivals = [one for one in contenders if one.seconds is not None]
    others = rivals if best.seconds else contenders
    if any(one.step_seconds < best.step_seconds for one in others if not one.why):
        best.why = f"as fast as any, within {TIE:.0%}, {'timed' if best.seconds else 'as predicted'}"
    elif best.seconds:
        best.why = f"the fastest of {len(rivals)} that were timed"
    else:
        best.why = "the fastest that fits, as predicted"
    for one in contenders:
        if one.why:
            continue
        if best.seconds and one.seconds:
            one.why = f"{one.seconds / best.seconds:.2f} times the seconds, timed"
        else:
            one.why = f"{one.found.seconds / best.found.seconds:.2f} times the seconds, predicted"


def _left_out(
    task: Task, room: Room, contenders: Iterable[Contender], level: float, measured: Collection[Mode]
) -> list[record.Choice]:
    """Returns what was not chosen from: the whole batch in stock PyTorch where it does not fit, and missing modes."""
    there, stored = {one.candidate.mode for one in contenders}, task.weights(level)[0]
    whole = Candidate(task.batch, weights=stored)
    missing = [] if room.fits(whole) else [Contender(Found(whole, room.needed(whole), math.inf), "does not fit")]
    for one in task.smallest(level):
        if one.mode not in there and one.weights == stored:
            needed = room.needed(one)
            slower = "slower than stock PyTorch, which fits"
            why = slower if one.mode in measured else "no time was left to measure it"
            why = why if needed <= room.available else "does not fit"
            missing.append(Contender(Found(one, needed, math.inf), why))
    return [one.choice(task) for one in missing]


def _rounded(seconds: float | None) -> float | None:
    return round(seconds, 4) if seconds is not None and math.isfinite(seconds) else None


def _plain(value: Any) -> Any:
    return plain(value, resolve=True) if OmegaConf.is_config(value) else value


def _halvings(sizes: list[int]) -> list[int]:
    """Returns the largest of some sizes, half of it, half of that, ... down to the smallest."""
    found = {sizes[-1] >> power for power in range(sizes[-1].bit_length())}
    return sorted(size for size in sizes if size in found or size == sizes[0])
