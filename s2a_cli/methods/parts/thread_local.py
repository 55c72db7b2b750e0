"""Keeps what one hook of a forward pass hands on to a later one, for each thread apart."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar, overload

import torch
from torch import nn

from s2a_cli.activations.checkpointing import runs_in_parts
from s2a_cli.activations.torch_checkpoint import is_checkpointing, is_checkpointing_reentrantly
from s2a_cli.common.errors import UserError

T = TypeVar("T")


class _Values(threading.local):
    """Holds a value for each thread; a copy holds none."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Values, ()


class ThreadLocal(Generic[T]):
    """An attribute of a module of which each thread has its own, so that several can run one model at a time.

        class Ladder(nn.Module):
            _state = ThreadLocal[Tensor | None](None)

    Begins with `default` in every thread, and in every copy of the module. The compiler can't trace thread-local data:
    in what it has compiled, threads share the value.
    """

    def __init__(self, default: T):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.values, self.compiled = f"{name}_of_threads", f"{name}_compiled"

    @overload
    def __get__(self, module: None, owner: type) -> ThreadLocal[T]: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> T: ...

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if not torch.compiler.is_compiling():
            value = getattr(module.__dict__.get(self.values), "value", self.default)
            if value is not self.default:
                return value
        return getattr(module, self.compiled, self.default)  # also where the hook before was compiled and this is not

    def __set__(self, module: nn.Module, value: T) -> None:
        if torch.compiler.is_compiling():
            setattr(module, self.compiled, value)
            return
        module.__dict__.setdefault(self.values, _Values()).value = value
        if getattr(module, self.compiled, self.default) is not self.default:  # of a hook before, which was compiled
            setattr(module, self.compiled, self.default)


class HandedOn(ThreadLocal[T]):
    """A value that a hook of one block hands on to what runs behind that block, beside the hidden state.

    PyTorch's own checkpointing of blocks does not know of it: where a block is computed again for the backward pass,
    what the block before it handed on is gone, and the reentrant kind has no graph of it. Nor does a checkpointed
    module that holds several blocks, which runs them some images at a time, and again. Raises UserError in both.
    between_blocks: whether blocks read it; what reads it behind the blocks alone has a graph of it in the other kind.
    """

    def __init__(self, default: T, between_blocks: bool = True):
        super().__init__(default)
        self.between_blocks = between_blocks

    def __set__(self, module: nn.Module, value: T) -> None:
        if value is not self.default and not torch.compiler.is_compiling():
            self._refuse_parts(module)
            if self._is_lost():
                raise UserError(
                    f"method: {type(module).__name__} hands its state from block to block, which torch.utils.checkpoint"
                    " does not know: take that off (in timm: model.set_grad_checkpointing(False)), and use"
                    " s2a_cli.checkpointed(attached.blocks)"
                )
        super().__set__(module, value)

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        value = super().__get__(module, owner)
        if module is not None and value is not self.default and not torch.compiler.is_compiling():
            self._refuse_parts(module)
        return value

    def _refuse_parts(self, module: nn.Module) -> None:
        if runs_in_parts():
            raise UserError(
                f"method: {type(module).__name__} hands its state from block to block, which a checkpointed module that"
                " holds several blocks would lose: give attached.blocks as the blocks"
            )

    def _is_lost(self) -> bool:
        return is_checkpointing_reentrantly() or (self.between_blocks and is_checkpointing())
