"""Checks what a caller of the library gives as an argument."""

from __future__ import annotations

from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief


def check_type(name: str, value: object, accepted: type | tuple[Any, ...], expected: str) -> None:
    """Raises UserError where the argument of this name is of none of the accepted types, which `expected` describes."""
    if not isinstance(value, accepted):
        raise UserError(f"{name}: expected {expected}, not {described(value)}")


def described(value: object) -> str:
    """Returns a value as a message shows it: itself where that is short, else its type."""
    items = value if isinstance(value, list | tuple) else [value]
    plain = all(isinstance(item, str | int | float | None) for item in items)
    return brief(repr(value)) if plain else type(value).__name__
