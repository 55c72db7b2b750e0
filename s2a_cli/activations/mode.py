"""Intercepts operators, in this one place: a TorchFunctionMode with a table {function: handler}.

What a handler is and how one is registered is in ops/registry.py. What holds where an operator is called (the settings
of its block, the random numbers of a batch chunk) is in a stack of frames a thread, which only this file changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from s2a_cli.activations.checkpointing import CheckpointedBlock, checkpointed_blocks
from s2a_cli.activations.context import OpContext
from s2a_cli.activations.ops.registry import Handler, handlers_of
from s2a_cli.activations.quant.calibration import Calibration
from s2a_cli.activations.random_numbers import SampleDraws
from s2a_cli.activations.recompute import unread_linear
from s2a_cli.activations.sites import Sites, follow
from s2a_cli.activations.torch_checkpoint import refuse_checkpointing
from s2a_cli.config.schema import QuantConfig


@dataclass
class Counters:
    """Counts calls of operators, those of frames further in included."""

    linears: int = 0  # calls of F.linear


@dataclass(frozen=True)
class Frame:
    """Holds the settings for the operators that a forward pass, or a block in it, calls."""

    config: QuantConfig
    handlers: dict[Callable, Handler]
    draws: SampleDraws | None = None  # the random numbers of the batch chunk that runs
    unread: int = 0  # the number of the call of F.linear whose output nothing reads; or 0
    grad: bool = field(default_factory=torch.is_grad_enabled)  # whether gradients were on when it began
    counters: Counters = field(default_factory=Counters)


class ThreadState(threading.local):
    """Holds where a mode is in one thread."""

    def __init__(self) -> None:
        self.frames: list[Frame | None] = []  # the innermost last; None: PyTorch has taken the mode off
        self.exits: list[ExitStack] = []  # one for each time that it was entered, one within the other


_entered = threading.local()  # .mode: the one that this thread has entered


@contextmanager
def uncoded() -> Iterator[None]:
    """Makes operators called within keep what PyTorch keeps, whatever mode this thread is in."""
    mode = None if torch.compiler.is_compiling() else getattr(_entered, "mode", None)
    with mode.uncoded() if mode else nullcontext():
        yield


class ActivationMode(TorchFunctionMode):
    """Makes forward passes within it keep low-bit codes; made once, entered every step.

    It is of the thread that enters it, as torch.no_grad is. Entering it again within itself changes nothing; raises
    RuntimeError within another one.
    """

    def __init__(self, config: QuantConfig, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.config, self.handlers = config, handlers_of(config)
        self.calibration, self.sites = Calibration(config), Sites()
        self._given = list(blocks)
        self.blocks = checkpointed_blocks(self, self._given)
        self._thread = ThreadState()

    def __reduce__(self) -> tuple[type[ActivationMode], tuple[QuantConfig, list[nn.Module]]]:
        """Makes a copy begin anew: no thread is within it, nothing is fitted; blocks are copied with their model."""
        return ActivationMode, (self.config, self._given)

    @property
    def frame(self) -> Frame | None:
        """Returns what holds in this thread now; None where operators do not reach the mode."""
        return self._thread.frames[-1] if self._thread.frames else None

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        frame, kwargs = self.frame, kwargs or {}
        if frame is None:  # in a thread that autograd handed the mode on to
            return func(*args, **kwargs)
        frames = self._thread.frames
        frames.append(None)
        try:
            if func is F.linear:
                frame.counters.linears += 1
                if frame.counters.linears == frame.unread:
                    return unread_linear(*args, **kwargs)
            if frame.draws is not None and func is Tensor.bernoulli_:
                return frame.draws.bernoulli_(*args, **kwargs)
            handler = frame.handlers.get(func)
            if handler is None:
                return func(*args, **kwargs)
            op = OpContext(frame.config, self.calibration, self.sites.call(func.__name__))
            refuse_checkpointing(frame.grad)
            if not torch.is_grad_enabled() or not kwargs.keys() <= handler.keywords:
                return func(*args, **kwargs)
            out = handler.run(op, func, *args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        finally:
            frames.pop()

    def __enter__(self) -> ActivationMode:
        with ExitStack() as stack:
            if not self._thread.exits:
                if getattr(_entered, "mode", None):
                    raise RuntimeError(
                        "this thread is within another compress_activations(...) already: use one for the whole forward"
                        " pass"
                    )
                for block in self.blocks:
                    stack.enter_context(block.installed())
                self.calibration.next_pass()
                stack.enter_context(self._running())
                _entered.mode = self
                stack.callback(setattr, _entered, "mode", None)
            self._thread.exits.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._thread.exits:
            raise RuntimeError(
                "this thread is not within this compress_activations(...): leave it in the thread that entered it"
            )
        self._thread.exits.pop().close()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Makes the mode hold for what is computed again in a backward pass, within the mode or after it."""
        if self.frame is not None:
            yield
        else:
            with self._running():
                yield

    @contextmanager
    def inside(
        self, block: CheckpointedBlock, name: str, unread: int = 0, draws: SampleDraws | None = None
    ) -> Iterator[None]:
        """Makes operators called within belong to this block, known as `name`, and be counted from its first.

        unread: the linear layer of which only the gradient is wanted, counted from 1; or 0.
        """
        counters = self._active().counters
        unread = counters.linears + unread if unread else 0
        frame = Frame(block.config, block.handlers, draws, unread, counters=counters)
        with self._pushed(frame), self.sites.inside(block.module, name):
            yield

    @contextmanager
    def counting(self) -> Iterator[Counters]:
        """Counts calls of operators within from 0; those around it do not see them."""
        counters = Counters()
        with self._pushed(replace(self._active(), counters=counters)):
            yield counters

    @contextmanager
    def uncoded(self) -> Iterator[None]:
        """Makes operators called within keep what PyTorch keeps."""
        with self._pushed(replace(self._active(), handlers={})):
            yield

    def _active(self) -> Frame:
        frame = self.frame
        if frame is None:
            raise RuntimeError("this thread is not within this compress_activations(...)")
        return frame

    @contextmanager
    def _running(self) -> Iterator[None]:
        handed_on = self in _get_current_function_mode_stack()  # by autograd, to the thread of a device
        with self.sites.outermost(), follow(self.sites), self._pushed(Frame(self.config, self.handlers)):
            if handed_on:
                yield
                return
            super().__enter__()
            try:
                yield
            finally:
                super().__exit__(None, None, None)

    @contextmanager
    def _pushed(self, frame: Frame) -> Iterator[None]:
        frames = self._thread.frames
        frames.append(frame)
        try:
            yield
        finally:
            frames.pop()
