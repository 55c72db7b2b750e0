"""Collects the handlers of operator families: the functions that each stands in for, and the setting that turns it on.

A handler is called as handler(op, stock, *args, **kwargs), where `op` is the OpContext of the call and `stock` the
function that was called. It returns what `stock` would, bit for bit (to rounding where a CUDA kernel makes output and
codes in one pass), and keeps less for the backward pass. It returns NotImplemented for arguments that it does not
cover, and the call is PyTorch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from s2a_cli.config.schema import QuantConfig


class Handler(NamedTuple):
    """Holds a handler, the keywords that it takes, and the settings of which any one turns it on."""

    run: Callable[..., Any]
    keywords: frozenset[str]  # with others, such as out=, a call is PyTorch's
    bits: tuple[str | None, ...]  # fields of QuantConfig; None: `lossless`

    def is_on(self, config: QuantConfig) -> bool:
        """Returns whether calls are handled under these settings."""
        return any(config.lossless if field is None else getattr(config, field) is not None for field in self.bits)


HANDLERS: dict[Callable, Handler] = {}


def register(
    handlers: dict[Callable, Callable], bits: str | tuple[str, ...] | None, keywords: Iterable[str] | None = None
) -> None:
    """Registers {function of PyTorch: its handler}.

    bits: the field of QuantConfig that turns them on, such as "pointwise", or several; None for those that are exact
    and need no bit-width. keywords: those that the handlers take; by default the names of their parameters.
    Raises ValueError for a function that has a handler already.
    """
    for function, run in handlers.items():
        if function in HANDLERS:
            raise ValueError(f"{function} has a handler already: {HANDLERS[function].run}")
        names = inspect.signature(run).parameters if keywords is None else keywords
        HANDLERS[function] = Handler(run, frozenset(names), bits if isinstance(bits, tuple) else (bits,))


def handles(
    *functions: Callable, bits: str | tuple[str, ...] | None, keywords: Iterable[str] | None = None
) -> Callable[[Callable], Callable]:
    """Decorates the handler of these functions of PyTorch; see `register`."""

    def decorate(handler: Callable) -> Callable:
        register(dict.fromkeys(functions, handler), bits, keywords)
        return handler

    return decorate


def handlers_of(config: QuantConfig) -> dict[Callable, Handler]:
    """Returns the handlers that these settings turn on, by the function that they stand in for."""
    return {function: handler for function, handler in HANDLERS.items() if handler.is_on(config)}
