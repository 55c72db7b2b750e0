"""Memory without a GPU: run real training steps on tensors without data, and count the bytes of what is alive.

`predict` runs two steps of the training loop under FakeTensorMode. Everything that decides memory is the real thing:
the model, its hooks, autograd, the optimiser, the code of the step. Only the kernels are missing, so it takes about a
second and next to no memory. `Tracker` counts live storages, on fake and on real tensors alike.

What a CUDA device does differently, and is not modelled:
- the workspaces of cuBLAS and cuDNN, the CUDA context, fragmentation, what a kernel allocates and frees inside;
- which attention kernel runs: here the fused one of the CPU, which keeps q, k, v, the output and the logsumexp;
- autocast's list of operators that stay in fp32: the CPU's is shorter (an unfused softmax is not on it);
- autograd adds two gradients of one tensor in place where it can; under a tracker it never does, so that the peak
  may be one gradient too high where it lies on a residual connection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2a_cli.memory.result import MIB, Memory

aten = torch.ops.aten
ALLOCATION = 512  # bytes; CUDA's caching allocator rounds each request up to a multiple

# step(model, optimizer, *batch, after_forward=f): one training step. It calls f() when a forward pass is over, before
# the backward pass starts (once a micro-batch).
Step = Callable[..., object]
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators return while it is active, until each is freed.

    Storages are counted, not tensors: a view or an in-place result costs nothing, and a small view keeps all of its
    base alive, as it does on a device. `add` registers tensors that exist already. Enter it inside a FakeTensorMode
    to count fake tensors. There, reading a value (`loss.item()`, Adam's step counter) gives one, and a GradScaler
    finds all gradients finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes
        self.peak = 0  # bytes, since the start or the last reset_peak()
        self._storages: dict[int, tuple[weakref.ref, int]] = {}  # address -> the storage, its bytes
        self._found_inf: set[int] = set()  # addresses of GradScaler's flags

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors`, where they are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address, size = storage._cdata, -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            reference, counted = self._storages.get(address, (None, 0))
            if size == counted:
                continue
            if reference is None:  # runs when the last tensor on it dies, be it in Python or in the autograd graph
                reference = weakref.ref(storage, lambda _, address=address: self._forget(address))
            self._storages[address] = (reference, size)
            self.live += size - counted
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        self.peak = self.live

    def _forget(self, address: int) -> None:
        _, size = self._storages.pop(address)
        self.live -= size
        self._found_inf.discard(address)

    def _value(self, tensor: FakeTensor) -> bool | int | float:
        """What reading a fake tensor gives: one, and zero for a GradScaler's flag that a gradient is infinite."""
        value = 0.0 if tensor.untyped_storage()._cdata in self._found_inf else 1.0
        return value if tensor.dtype.is_floating_point else tensor.dtype is torch.bool or 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._found_inf.add(args[1].untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def track(model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer) -> Memory:
    """Trains `model` for two steps and counts the second: the core of `predict`, and its check on real CPU tensors.

    Gradients are released between the steps. The optimiser is told to work on lists of tensors (foreach) unless it
    was told otherwise, as it does by itself on CUDA and not on a CPU.
    """
    with Tracker() as tracker:
        tracker.add([*model.parameters(), *model.buffers()])
        optimizer = make_optimizer(model)
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        forward: list[int] = []  # live bytes after each forward pass of a step
        for _ in range(2):  # the first step creates the optimiser's state
            optimizer.zero_grad(set_to_none=True)
            static = tracker.live
            forward.clear()
            tracker.reset_peak()
            # The clone is the batch on the device: there from the start of the step to its end.
            step(model, optimizer, *[t.clone() for t in batch], after_forward=lambda: forward.append(tracker.live))
    if not forward:
        raise ValueError("the step must call after_forward() between its forward and its backward pass")
    kept = forward[0] - static  # the first micro-batch: later ones find gradients beside what is kept
    return Memory("predicted", peak_mib=tracker.peak / MIB, static_mib=static / MIB, kept_mib=kept / MIB)


def predict(model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer) -> Memory:
    """Predicts the memory of training `model` with `step`, on a machine without the device and without the memory.

    model: on any device, "meta" included. Left exactly as found, also when the step fails; hooks that refer to its
        submodules go on working, because only the tensors in them are replaced while the prediction runs.
    batch: the step's inputs, such as images [B, 3, H, W] and targets [B]. Only shapes and dtypes are read, so meta
        tensors will do.
    step: `step(model, optimizer, *batch, after_forward=f)`, the training step itself; must call `f()` between a
        forward pass and its backward pass. It works on CPU tensors here, so autocast must be for "cpu".
    make_optimizer: called with the model; must take the parameters from it.

    Raises ValueError when the step does not call `f()`, torch's DataDependentOutputException or
    DynamicOutputShapeException where memory depends on the data, and whatever the step raises.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), fake_tensors(model):
        return track(model, [_fake(tensor) for tensor in batch], step, make_optimizer)


def saved_bytes(function: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Bytes that autograd saves for the backward pass while `function()` runs: each storage once and whole.

    The parameters and buffers of `model` don't count: they are there anyway.
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())} if model else set()
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # noqa: F841  held until the count is done
    return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Replaces the parameters and buffers of `model` by fake CPU tensors; then restores the very same objects.

    A copy of the model would not do: its hooks would still point to the modules of the original. Needs an active
    FakeTensorMode.
    """
    modules = list(model.modules())
    tables = [table for module in modules for table in (module._parameters, module._buffers)]
    originals = [dict(table) for table in tables]
    training = [module.training for module in modules]
    fakes = {id(t): _fake(t) for table in originals for t in table.values() if t is not None}  # tied tensors stay tied
    try:
        for table in tables:
            table.update((name, fakes[id(t)]) for name, t in table.items() if t is not None)
        yield
    finally:
        for table, original in zip(tables, originals, strict=True):
            table.clear()
            table.update(original)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _fake(tensor: Tensor) -> Tensor:
    """An empty CPU tensor of the same kind; fake where a FakeTensorMode is active."""
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fake.__dict__.update(tensor.__dict__)
    return fake
