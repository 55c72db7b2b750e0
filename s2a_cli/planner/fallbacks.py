"""Says what would fit where nothing does: what the words of a run would have to give up, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import method_schema
from s2a_cli.config.rules import show
from s2a_cli.config.settings import replaced, with_defaults
from s2a_cli.memory.result import MIB
from s2a_cli.planner.candidates import FIDELITY
from s2a_cli.planner.costs import assumed
from s2a_cli.planner.search import plans
from s2a_cli.planner.task import Task
from s2a_cli.training.run import attach

SIDE: dict[str, Any] = {"method": "side"}
STEPS: tuple[dict[str, Any], ...] = (  # what is given up, the least first
    {"dataset.cache": None},
    {"fidelity": "0.999"},
    {"fidelity": "0.99"},
    {"backbone.weights": "offload"},
    {"backbone.weights": "bf16"},
    {"backbone.weights": "int8"},
    SIDE,
    {"fidelity": "0.999", "backbone.weights": "int8"},
    {"backbone.weights": "nf4"},
    {"fidelity": "0.99", "backbone.weights": "nf4"},
    {**SIDE, "backbone.weights": "nf4"},
)
ENOUGH = 3  # of these are named


@dataclass(frozen=True)
class Fallback:
    """Words in the place of a run's own, and the least bytes of the device that a plan then needs, predicted."""

    words: tuple[str, ...]
    needed: float


def fallbacks(task: Task) -> Iterator[Fallback]:
    """Yields what could be given up, cheapest first, each with its prediction; what the run can't take is left out."""
    for changes in STEPS:
        level = changes.get("fidelity", task.config.fidelity)
        if FIDELITY[level] >= FIDELITY[task.config.fidelity] and "fidelity" in changes:
            continue
        if "dataset.cache" in changes and not task.config.dataset.cache:
            continue
        try:
            changed = _changed(task, changes)
            smallest = changed.smallest(FIDELITY[level])
            least = [one for one in smallest if one.mode.recomputes and (one.micro_batch > 1 or not one.mode.cuts)]
            needed = min(map(changed.needed, least or smallest))
        except UserError:
            continue
        yield Fallback(tuple(f"{key}={show(value)}" for key, value in changes.items()), needed)


def _changed(task: Task, changes: dict[str, Any]) -> Task:
    """Returns the task with other settings. Raises UserError where they don't fit the backbone."""
    settings = {key: value for key, value in changes.items() if key != "method"}
    config = replaced(task.config, settings)
    if "method" in changes:
        method = with_defaults(method_schema(changes["method"]))
        method.name, method.lr = changes["method"], config.optim.lr
        config.method = method
    if not {"method", "backbone.weights"} & changes.keys():
        return replace(task, config=config)
    attached = attach(config, backbones.build(config.backbone, task.classes, meta=True))
    return replace(task, config=config, attached=attached, _stored={})


@dataclass(frozen=True)
class Option:
    """A change of a run's words, the bytes of the device that it is then predicted to need, and what it is."""

    words: tuple[str, ...]
    needed: float
    about: str


def options(task: Task) -> Iterator[Option]:
    """Yields changes to a run that does not fit, cheapest in speed first, as far as that is known without measuring.

    The plans that fit come first, those that leave the gradient as it is ahead of others; then what gives up more.
    """
    task = replace(task, config=replaced(task.config, {"fidelity": "0.99", "backbone.weights": "fp32"}))
    found, _ = plans(task.room(), assumed(task.total), task.batch, task.modes(FIDELITY["0.99"]))
    known = []
    for plan in sorted(found, key=lambda plan: -plan.candidate.fidelity):
        if plan.candidate.mode not in known:
            known.append(plan.candidate.mode)
            words = tuple(task.words(plan.candidate))
            yield Option(words, plan.needed, plan.candidate.describe(task.batch))
    for fallback in fallbacks(task):
        yield Option(fallback.words, fallback.needed, "with one image at a time, of the plans that take least")


def said(task: Task, least: float) -> str:
    """Returns the line that says that nothing fits, and what would: the first fallbacks that do, or the least."""
    tried: list[Fallback] = []
    for fallback in fallbacks(task):
        tried.append(fallback)
        if len(fitting := [one for one in tried if one.needed <= task.available]) == ENOUGH:
            break
    else:
        fitting = [one for one in tried if one.needed <= task.available]
    line = (
        f"budget={task.config.budget}: nothing fits; with fidelity={task.config.fidelity} the least that a step of this"
        f" run takes is {least / MIB:,.1f} MiB, as predicted"
    )
    if fitting:
        return f"{line}; would fit, cheapest first: {'; '.join(map(_told, fitting))}"
    smallest = cast(Fallback, min(tried, key=lambda one: one.needed, default=None))
    rest = f"; {_told(smallest)} is the least of what else there is" if tried else ""
    return f"{line}{rest}; a smaller optim.batch_size, backbone.image_size or backbone needs less"


def _told(fallback: Fallback) -> str:
    return f"{' '.join(fallback.words)} ({fallback.needed / MIB:,.1f} MiB)"
