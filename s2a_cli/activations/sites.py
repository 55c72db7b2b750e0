"""Names the calls of operators: the module that makes the call, the operator, and which of its calls there it is.

A name stays the same in every step, batch chunk and recomputation, and whatever else of the model is trained: calls are
counted whether or not they are coded. Modules are followed by PyTorch's global forward hooks, which are registered
while a memory is active in any thread.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from s2a_cli.common.hooks import reads_output_only

COMPILED = (
    "a model that torch.compile has compiled within compress_activations: codes and recomputation break the compiler's"
    " graph at every operator. Call the model itself (of torch.compile(model): compiled._orig_mod), or train the"
    " compiled one without compress_activations"
)
COMPILED_AROUND = (
    "compress_activations is entered in a function that torch.compile has compiled: codes and recomputation break the"
    " compiler's graph at every operator. Put torch.compiler.disable around that function"
)
_names: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, str]] = WeakKeyDictionary()  # of a root's modules


class Sites(threading.local):
    """Holds where the forward pass of this thread is."""

    def __init__(self) -> None:
        self._running: list[tuple[nn.Module, str]] = []
        self._root: nn.Module | None = None  # the module that names are relative to; None: the outermost that runs
        self._prefix = ""
        self._calls: Counter[tuple[str, Any]] = Counter()

    @property
    def module(self) -> str:
        """Returns the name of the module that runs."""
        return self._running[-1][1] if self._running else self._prefix

    def call(self, name: str) -> str:
        """Returns the name of this call of the operator of that name."""
        module = self.module
        self._calls[module, name] += 1
        count = self._calls[module, name]
        return f"{module}:{name}" if count == 1 else f"{module}:{name}.{count}"

    def entry(self, otherwise: str) -> str:
        """Returns the name of the module that runs, told apart where it runs several times.

        otherwise: the name where it has none.
        """
        name = self.module or otherwise
        self._calls[name, "forward"] += 1
        count = self._calls[name, "forward"]
        return name if count == 1 else f"{name}@{count}"

    def outermost(self) -> AbstractContextManager[None]:
        """Begins a forward pass, or a recomputation: nothing has been called within, and no module runs."""
        return self._within(None, "")

    def inside(self, module: nn.Module, name: str) -> AbstractContextManager[None]:
        """Makes calls within belong to this module, here known as `name`, and be counted from its first."""
        return self._within(module, name)

    @contextmanager
    def _within(self, root: nn.Module | None, prefix: str) -> Iterator[None]:
        before = self._running, self._root, self._prefix, self._calls
        self._running, self._root, self._prefix, self._calls = [], root, prefix, Counter()
        try:
            yield
        finally:
            self._running, self._root, self._prefix, self._calls = before

    def enters(self, module: nn.Module) -> None:
        root = self._root or (self._running[0][0] if self._running else module)
        own = _name(root, module)
        self._running.append((module, f"{self._prefix}.{own}" if self._prefix and own else self._prefix or own))

    def leaves(self, module: nn.Module) -> None:
        while self._running and self._running.pop()[0] is not module:
            pass  # modules that an exception has left


def _name(root: nn.Module, module: nn.Module) -> str:
    """Returns the name of a module within a root; of one that the root does not hold, its class's."""
    known = _names.get(root)
    if known is None or module not in known:
        known = _names[root] = WeakKeyDictionary((m, name) for name, m in root.named_modules())
    return known.setdefault(module, type(module).__name__)


class _Followed(threading.local):
    sites: Sites | None = None


_followed = _Followed()
_lock, _users, _following = threading.Lock(), 0, ExitStack()


@contextmanager
def follow(sites: Sites) -> Iterator[None]:
    """Tells `sites` about the modules that this thread runs within."""
    global _users
    with _lock:
        if _users == 0:
            _begin()
        _users += 1
    before, _followed.sites = _followed.sites, sites
    try:
        yield
    finally:
        _followed.sites = before
        with _lock:
            _users -= 1
            if _users == 0:
                _following.close()


def _begin() -> None:
    """Registers the hooks. Raises RuntimeError, and registers none, within what torch.compile has compiled."""
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(_before).remove)
        stack.callback(register_module_forward_hook(_after).remove)
        if "torch._dynamo.decorators" in sys.modules:  # else nothing can be compiled, and to load it takes seconds
            try:  # what torch.compile made runs as it was, so that the hooks see it
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:
                raise RuntimeError(COMPILED_AROUND) from error
        _following.push(stack.pop_all())


def is_compiled(module: nn.Module) -> bool:
    """Tells whether torch.compile has made this module, or compiled it in place."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _before(module: nn.Module, inputs: tuple) -> None:
    if _followed.sites is not None:
        if isinstance(module, nn.DataParallel):
            raise RuntimeError(
                "nn.DataParallel runs the model in threads of its own, in which nothing would be coded;"
                " use one process a device (DistributedDataParallel) instead"
            )
        if is_compiled(module):
            raise RuntimeError(COMPILED)
        _followed.sites.enters(module)


@reads_output_only
def _after(module: nn.Module, inputs: tuple, output: Any) -> None:
    if _followed.sites is not None:
        _followed.sites.leaves(module)
