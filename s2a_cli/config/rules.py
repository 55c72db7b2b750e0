"""Rules for the values of settings: a test of a value, and the words in which a message names what is accepted."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s2a_cli.common.text import brief, nearest


class Rule:
    """What a setting accepts: a test and the words for it. Whether it accepts null is said by the schema instead."""

    def __init__(self, accepted: str, test: Callable[[Any], bool], choices: tuple[str, ...] = ()):
        self.accepted, self._test, self.choices = accepted, test, choices

    def test(self, value: Any) -> bool:
        """Returns whether a value is accepted."""
        try:
            return bool(self._test(value))
        except (ArithmeticError, TypeError, ValueError, RuntimeError):  # of another kind, or too large for any
            return False

    def problem(self, key: str, value: Any, optional: bool = False) -> str:
        """Returns the line about a value that is not accepted."""
        or_null = ", or null" if optional else ""
        hint = nearest(value, self.choices) if isinstance(value, str) else ""
        return f"{key}={brief(show(value))}: expected {self.accepted}{or_null}{hint}"


def one_of(*choices: str) -> Rule:
    """Accepts one of these texts."""
    return Rule(f"one of {', '.join(choices)}", choices.__contains__, choices)


def number(accepted: str, test: Callable[[Any], bool]) -> Rule:
    """Accepts a finite number that passes the test."""
    return Rule(accepted, lambda value: math.isfinite(value) and test(value))


def numbers(count: int, accepted: str, test: Callable[..., bool] = lambda *values: True) -> Rule:
    """Accepts a list of `count` finite numbers that pass the test together."""
    return Rule(accepted, lambda values: len(values) == count and all(map(math.isfinite, values)) and test(*values))


def pattern(accepted: str, regex: str) -> Rule:
    """Accepts a text that a regular expression matches as a whole."""
    return Rule(accepted, lambda value: re.fullmatch(regex, value) is not None)


def _is_path(value: str) -> bool:
    """Returns whether a file system can hold it. Raises RuntimeError for `~` of an unknown user, or without a home."""
    parts = Path(value).expanduser().parts
    return len(os.fsencode(value)) < 4096 and all(len(os.fsencode(part)) < 256 for part in parts)


def show(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {show(inner)}' for key, inner in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


PATH = Rule("a path: names of at most 255 bytes, 4095 together, and ~ only with a home folder", _is_path)
# The name of a folder.
NAME = pattern(
    "a name of at most 100 letters, digits, _ . + -, which begins with one of the first three", r"\w[\w.+-]{0,99}"
)
