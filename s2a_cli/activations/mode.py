"""The one place where operators are intercepted: a TorchFunctionMode with a table {function: handler}.

What a handler is and how one is registered is in ops/registry.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from s2a_cli.activations.checkpointing import BlockRunner, runners_of
from s2a_cli.activations.context import OpContext
from s2a_cli.activations.ops.registry import Handler, handlers_of
from s2a_cli.activations.quant.calibration import Calibration
from s2a_cli.activations.random_numbers import Draws
from s2a_cli.activations.recompute import unread_linear
from s2a_cli.activations.sites import Sites, follow
from s2a_cli.activations.torch_checkpoint import refuse_checkpointing
from s2a_cli.config.schema import QuantConfig


class Thread(threading.local):
    """Where a mode is in one thread."""

    entered = 0  # how many times, one within the other
    exit: ExitStack
    on = False  # whether operators reach the mode: PyTorch takes it off while it handles one
    grad = False  # whether gradients were on when the forward pass, or the block, began
    config: QuantConfig  # of the block that runs
    handlers: ClassVar[dict[Callable, Handler]] = {}  # likewise; none in a thread that autograd handed the mode on to
    linears = 0  # calls of F.linear so far
    unread = 0  # the number of the one whose output nothing reads; or 0
    draws: Draws | None = None  # the random numbers of the piece that runs


_inside = threading.local()  # .mode: the one that this thread has entered


class ActivationMode(TorchFunctionMode):
    """Within it, forward passes keep low-bit codes; see `s2a_cli.activations.remember`. Made once, entered every step.

    It is of the thread that enters it, as torch.no_grad is. Entering it again within itself changes nothing; raises
    RuntimeError within another one.
    """

    def __init__(self, config: QuantConfig, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.config, self.handlers = config, handlers_of(config)
        self.calibration, self.sites = Calibration(config), Sites()
        self.runners = runners_of(self, blocks)
        self.thread = Thread()

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        thread, kwargs = self.thread, kwargs or {}
        on, thread.on = thread.on, False
        try:
            if func is F.linear:
                thread.linears += 1
                if thread.linears == thread.unread:
                    return unread_linear(*args, **kwargs)
            if thread.draws is not None and func is Tensor.bernoulli_:
                return thread.draws.bernoulli_(*args, **kwargs)
            handler = thread.handlers.get(func)
            if handler is None:
                return func(*args, **kwargs)
            op = OpContext(thread.config, self.calibration, self.sites.call(func.__name__))
            refuse_checkpointing(thread.grad)
            if not torch.is_grad_enabled() or not kwargs.keys() <= handler.keywords:
                return func(*args, **kwargs)
            out = handler.run(op, func, *args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        finally:
            thread.on = on

    def __enter__(self) -> ActivationMode:
        thread = self.thread
        if not thread.entered:
            if getattr(_inside, "mode", None):
                raise RuntimeError(
                    "this thread is within another remember(...) already: use one for the whole forward pass"
                )
            with ExitStack() as stack:
                for runner in self.runners:
                    stack.enter_context(runner.installed())
                self.calibration.next_pass()
                stack.enter_context(self._entered())
                _inside.mode, thread.exit = self, stack.pop_all()
        thread.entered += 1
        return self

    def __exit__(self, *error: Any) -> None:
        thread = self.thread
        thread.entered -= 1
        if not thread.entered:
            _inside.mode = None
            thread.exit.close()

    @contextmanager
    def again(self) -> Iterator[None]:
        """The mode for what is computed again in a backward pass, which may run within the mode or after it."""
        if self.thread.on:
            yield
        else:
            with self._entered():
                yield

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self.sites.begin()
        handed_on = self in _get_current_function_mode_stack()  # by autograd, to the thread of a device
        with follow(self.sites), self._scope(on=True, config=self.config, handlers=self.handlers, draws=None, unread=0):
            if handed_on:
                yield
                return
            super().__enter__()
            try:
                yield
            finally:
                super().__exit__(None, None, None)

    @contextmanager
    def inside(self, block: BlockRunner, name: str, unread: int = 0, draws: Draws | None = None) -> Iterator[None]:
        """Operators called within belong to this block, known as `name`, and are counted from its first.

        unread: the linear layer of which only the gradient is wanted, counted from 1; or 0.
        """
        unread = self.thread.linears + unread if unread else 0
        scope = self._scope(config=block.config, handlers=block.handlers, draws=draws, unread=unread)
        with scope, self.sites.inside(block.module, name):
            yield

    @contextmanager
    def _scope(self, **values: Any) -> Iterator[None]:
        """These values in the state of this thread, and `grad` as it is now."""
        state = vars(self.thread)
        before = {name: getattr(self.thread, name, None) for name in (*values, "grad")}
        state.update(values, grad=torch.is_grad_enabled())
        try:
            yield
        finally:
            state.update(before)
