"""The one place where operators are intercepted: a TorchFunctionMode with a table {function: handler}.

A handler is called as handler(config, stock, *args, **kwargs), where `stock` is the function that was called. It
returns what `stock` would, bit for bit, and keeps less for the backward pass; for arguments that it does not cover it
calls `stock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from s2a_cli.activations import attention, conv, dropout, norm, pointwise, pooling, products
from s2a_cli.config import QuantConfig

FAMILIES = (pointwise, norm, attention, products, pooling, conv, dropout)


class ActivationMode(TorchFunctionMode):
    """Within it, forward passes remember low-bit codes; see `s2a_cli.activations.remember`."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.config = config
        self.handlers = dict(_active(config))

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        handler = self.handlers.get(func)
        if handler is None or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return handler(self.config, func, *args, **(kwargs or {}))


def _active(config: QuantConfig) -> Iterable[tuple[Callable, Callable]]:
    """The handlers of the operator families with a bit-width, and those that are exact and need none (None)."""
    for family in FAMILIES:
        for bits, handlers in family.HANDLERS.items():
            if bits is None or getattr(config, bits) is not None:
                yield from handlers.items()
