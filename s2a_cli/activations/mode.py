"""The one place where operators are intercepted: a TorchFunctionMode with a table {function: handler}.

A handler is called as handler(mode, stock, *args, **kwargs), where `stock` is the function that was called. It
returns what `stock` would, bit for bit (to rounding where a CUDA kernel makes output and codes in one pass), and keeps
less for the backward pass; for arguments that it does not cover it calls `stock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from s2a_cli.activations import attention, conv, dropout, norm, pointwise, pooling, products
from s2a_cli.activations.blocks import BlockRunner, unread_linear
from s2a_cli.activations.calibration import Calibration
from s2a_cli.config import QuantConfig

FAMILIES = (pointwise, norm, attention, products, pooling, conv, dropout)


class ActivationMode(TorchFunctionMode):
    """Within it, forward passes keep low-bit codes; see `s2a_cli.activations.remember`. Made once, entered every step."""

    def __init__(self, config: QuantConfig, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.config, self.calibration = config, Calibration(config)
        self.handlers = dict(_handlers(config))
        self.runners = []
        for index, block in enumerate(blocks):
            own = replace(config, **config.blocks.get(index, {}))
            self.runners.append(BlockRunner(self, index, block, own, dict(_handlers(own))))
        self._is_on, self._scope, self._count = False, "", 0
        self.linears = self._unread = 0

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        handler, kwargs = self.handlers.get(func), kwargs or {}
        on, self._is_on = self._is_on, False  # PyTorch takes a mode off while its handler runs, which may be a backward pass
        try:
            if func is F.linear and self.linears + 1 == self._unread and not args[1].requires_grad:
                out = unread_linear(*args, **kwargs)
            elif handler is None or not torch.is_grad_enabled():
                out = func(*args, **kwargs)
            else:
                out = handler(self, func, *args, **kwargs)
        finally:
            self._is_on = on
        self.linears += func is F.linear
        return out

    def __enter__(self) -> ActivationMode:
        with ExitStack() as stack:
            for runner in self.runners:
                stack.enter_context(runner.installed())
            stack.enter_context(self._entered())
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    @contextmanager
    def again(self) -> Iterator[None]:
        """The mode for what is computed again in a backward pass, which may run within the mode or after it."""
        if self._is_on:
            yield
        else:
            with self._entered():
                yield

    @contextmanager
    def _entered(self) -> Iterator[None]:
        before = self._is_on, self._scope, self._count
        super().__enter__()
        self._is_on, self._scope, self._count = True, "", 0
        try:
            yield
        finally:
            self._is_on, self._scope, self._count = before
            super().__exit__(None, None, None)

    @contextmanager
    def inside(self, block: BlockRunner, unread: int = 0) -> Iterator[None]:
        """Operators called within belong to this block: `site` and `linears` count them from its first.

        unread: the linear layer of which only the gradient is wanted, counted from 1.
        """
        before = self._scope, self._count, self.config, self.handlers
        self._scope, self._count, self._unread, self.linears = f"{block.index}.", 0, unread, 0
        self.config, self.handlers = block.config, block.handlers
        try:
            yield
        finally:
            (self._scope, self._count, self.config, self.handlers), self._unread = before, 0

    def site(self) -> str:
        """A name for the call of an operator, the same in every step, piece of a batch and recomputation."""
        self._count += 1
        return f"{self._scope}{self._count}"


def _handlers(config: QuantConfig) -> Iterator[tuple[Callable, Callable]]:
    """The handlers of the operator families with a bit-width, and those that are exact and need none (None)."""
    for family in FAMILIES:
        for bits, handlers in family.HANDLERS.items():
            if config.lossless if bits is None else getattr(config, bits) is not None:
                yield from handlers.items()
