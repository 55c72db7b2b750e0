"""Reads the words of `s2a sweep` as a grid of configs, without an import of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose, compose_sweep
from s2a_cli.config.overrides import expand, groups, read, value_text
from s2a_cli.config.rules import show
from s2a_cli.config.schema import RunConfig, SweepConfig
from s2a_cli.config.settings import members, replaced, rule_of, walk
from s2a_cli.planner.sizes import AUTO


@dataclass(frozen=True)
class Chosen:
    """One member of a grid: its words, those in which it differs from others, and its config, or why it has none.

    The config has the default batch size where the words say optim.batch_size=auto.
    """

    words: list[str]
    name: str
    config: DictConfig | None
    problem: str = ""


@dataclass(frozen=True)
class Grid:
    """What the words of a sweep stand for."""

    settings: SweepConfig
    members: list[Chosen]


def read_grid(words: list[str]) -> Grid:
    """Returns the grid that words stand for.

    Raises UserError for words that can't be read, for a value that fits no run, and where no member is one.
    """
    own = [word for word in words if word.removeprefix("++").startswith("sweep.")]
    rest = [word for word in words if word not in own]
    settings = compose_sweep([*expand([w for w in rest if w.startswith("experiment=")])[0], *own])
    given = {key for word in rest if (key := word.partition("=")[0])}
    rest = [f"{key}={_several(value)}" for key, value in settings.grid.items() if key not in given] + rest
    grid = expand(rest)
    varied = [index for index in range(len(rest)) if len({member[index] for member in grid}) > 1]
    found: list[Chosen] = []
    composed = _Composed()
    with Progress("reading", len(grid), " runs") as progress:
        for words in grid:
            name = " ".join(words[index] for index in varied) or "the only run"
            try:
                found.append(Chosen(words, name, composed([word for word in words if word != AUTO])))
            except UserError as error:
                found.append(Chosen(words, name, None, str(error)))
            progress.add(1)
    if mistakes := _mistakes(found):
        raise UserError("\n".join(mistakes))
    return Grid(settings, found)


class _Composed:
    """Composes the members of a grid; those that differ in their seed alone once, as it takes a tenth of a second."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], DictConfig] = {}  # words without the seed -> a config

    def __call__(self, words: list[str]) -> DictConfig:
        seeds = [word for word in words if re.fullmatch(r"seed=\d+", word)]
        if len(seeds) != 1 or any("${" in word for word in words):
            return compose(words)
        rest = tuple(word for word in words if word not in seeds)
        if rest not in self._known:
            self._known[rest] = compose(words)
            return self._known[rest]
        return replaced(self._known[rest], {"seed": int(seeds[0].removeprefix("seed="))})


def _several(value: Any) -> str:
    """Returns the values of a grid's key, a list or a text in Hydra's grammar, as they stand on a command line."""
    return ",".join(map(_one, value)) if isinstance(value, list) else show(value)


def _one(value: Any) -> str:
    """Returns a value of a grid's list; a text that Hydra reads as a list, a choice or a range means that."""
    if isinstance(value, str):
        try:
            override = read(f"_={value}")
        except UserError:  # quoted, it is a text
            return value_text(value)
        if override.is_sweep_override() or isinstance(override.value(), list):
            return value
    return value_text(value)


def _mistakes(found: list[Chosen]) -> list[str]:
    """Returns the lines about values that fit no run, and about all members where none is a run.

    A value that fits some runs alone is no mistake: the others are left out.
    """
    problems = [one.problem for one in found if one.problem]
    if len(problems) == len(found):
        return list(dict.fromkeys(line for problem in problems for line in problem.splitlines()))
    fine = {word for one in found if not one.problem for word in one.words}
    odd = dict.fromkeys(word for one in found if one.problem for word in one.words if word not in fine)
    return [line for word in odd if word != AUTO and _is_wrong(word) for line in _problem(word)]


def _is_wrong(word: str) -> bool:
    """Returns whether a word by itself is wrong: names no option of a group, or a value that its setting never has."""
    override: Any = read(word)
    key, value, known = override.key_or_group, override.value(), groups()
    if key in known:
        return any(one not in known[key] for one in (value if isinstance(value, list) else [value]))
    for full, schema, name in walk(RunConfig):
        if full == key and value is not None:
            rule = rule_of(schema, name)
            return not rule.test(value) if rule else members(schema, name) == (bool,) and not isinstance(value, bool)
    return False


def _problem(word: str) -> list[str]:
    try:
        compose([word])
    except UserError as error:
        return str(error).splitlines()
    return []
