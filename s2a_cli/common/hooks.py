"""What a forward hook says of itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Hook = TypeVar("Hook", bound=Callable[..., Any])


def reads_output_only(hook: Hook) -> Hook:
    """Marks a forward hook to which its module's inputs do not matter: they may be changed behind the pre-hooks."""
    hook.reads_output_only = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


def sets_modes_only(hook: Hook) -> Hook:
    """Marks a forward pre-hook that leaves a module's inputs as they are, and sets at most whether modules train."""
    hook.sets_modes_only = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


def may_change_input(hook: Callable) -> bool:
    """Returns whether a forward pre-hook, a bound method or a partial as well, is not marked by `sets_modes_only`."""
    return not getattr(_function(hook), "sets_modes_only", False)


def owner_of(hook: Callable) -> Any:
    """Returns the object whose method a hook is, itself or in a partial; None for a plain function."""
    return getattr(_function(hook), "__self__", None)


def may_read_input(hook: Callable) -> bool:
    """Returns whether a forward hook, a bound method or a partial as well, is not marked by `reads_output_only`."""
    return not getattr(_function(hook), "reads_output_only", False)


def _function(hook: Callable) -> Callable:
    """Returns what a partial, or a partial of one, is of."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
