"""Hydra's grammar of several values: `method=bias,s2a seed=range(0,3) backbone=glob(vit*)` stands for the runs of a grid."""

from __future__ import annotations

import itertools
from typing import Any

from s2a_cli.compose import CONF, groups
from s2a_cli.errors import UserError, nearest


def expand(words: list[str]) -> list[list[str]]:
    """The words of each member of a grid, in the order of nested loops: the first word that has several values is outermost.

    choice(), range(), sort(), shuffle(), `a,b` and, for config groups, glob() have several values. Raises UserError for
    words that can't be read, a glob that matches nothing, and interval(), which is for a search.
    """
    return [list(member) for member in itertools.product(*map(_values, words))]


def parsed(word: str) -> Any | None:
    """Hydra's reading of a word; None where it can't be read, which `compose` explains better."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word) if "=" in word else None
    except HydraException:
        return None


def _values(word: str) -> list[str]:
    from hydra.core.override_parser.types import Glob

    override = parsed(word)
    if override is None or not override.is_sweep_override():
        return [word]
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        known = groups(CONF).get(key)
        if known is None:
            raise UserError(f"{word}: glob() is for {', '.join(groups(CONF))}; give the values of {key}, separated by commas")
        found = value.filter(known)
        if not found:
            raise UserError(f"{word}: matches nothing; there are {', '.join(known)}{nearest(value.include[0], known)}")
    elif not override.is_discrete_sweep():
        raise UserError(f"{word}: an interval has no end of values; give some, or use it with s2a search")
    else:
        found = list(override.sweep_string_iterator())
    if not found:
        raise UserError(f"{word}: no values; range(0,3) means 0,1,2")
    return [f"{override.get_key_element()}={one}" for one in dict.fromkeys(found)]
