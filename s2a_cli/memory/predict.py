"""Predicts memory without a GPU: runs real training steps on tensors without data and counts the bytes alive.

`profile` runs a small and a whole step of the training loop on dataless tensors. Everything that decides memory is the
real thing: the model, its hooks, autograd, the optimiser, the code of the step. Only the kernels are missing, so it
takes about a second and next to no memory. What a CUDA device does differently is modelled in cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2a_cli.activations.chunk_sizes import planned_for
from s2a_cli.common.attributes import Attributes
from s2a_cli.common.dataless import Dataless
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.cuda import CudaAutocast
from s2a_cli.memory.result import MIB, Memory
from s2a_cli.memory.tracker import Tracker
from s2a_cli.memory.watch import Watch

FEW = 2  # samples of the first step, which is there to create the optimiser's state

# step(model, optimizer, *batch, after_forward=f): one training step. It calls f() when a forward pass is over, before
# the backward pass starts (once a micro-batch).
Step = Callable[..., object]
MakeOptimizer = Callable[[nn.Module], Optimizer]
Blocks = Mapping[str, nn.Module]


def observe(
    model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer, blocks: Blocks | None = None
) -> Profile:
    """Trains `model` for two steps and returns the profile of the second.

    The tensors may be without data, as `profile` has them, or real ones of the CPU, to check it by.

    Gradients are released between the steps. The optimiser is told to work on lists of tensors (foreach) unless it
    was told otherwise, as it does by itself on CUDA and not on a CPU.
    """
    batch = list(batch)
    batches = _few(batch), batch
    with planned_for("cuda"), CudaAutocast(), Tracker() as tracker:
        optimizer = make_optimizer(model)
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        with Watch(tracker, model, optimizer, blocks) as watch:
            for images in batches:
                optimizer.zero_grad(set_to_none=True)
                watch.step_begins()
                # The clone is the batch on the device: there from the start of the step to its end.
                step(model, optimizer, *watch.batch(images), after_forward=watch.after_forward)
    if not watch.kept:
        raise ValueError("the step must call after_forward() between its forward and its backward pass")
    memory = Memory("predicted", tracker.peak / MIB, watch.static / MIB, watch.kept[0] / MIB)
    return Profile.of(memory, tracker, watch)


def track(model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer) -> Memory:
    """Returns the memory of training on real tensors of the CPU, as if each were on a device."""
    return observe(model, batch, step, make_optimizer).memory


def profile(
    model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer, blocks: Blocks | None = None
) -> Profile:
    """Predicts the memory of training `model` with `step`, on a machine without the device and without the memory.

    model: on any device, "meta" included. Left exactly as found, also when the step fails; hooks that refer to its
        submodules go on working, because only the tensors in them are replaced while the prediction runs.
    batch: the step's inputs, such as images [B, 3, H, W] and targets [B]. Only shapes and dtypes are read, so meta
        tensors will do.
    step: `step(model, optimizer, *batch, after_forward=f)`, the training step itself; must call `f()` between a
        forward pass and its backward pass. It works on CPU tensors here, so autocast must be for "cpu".
    make_optimizer: called with the model; must take the parameters from it.
    blocks: {name: module of the model} that the breakdown tells apart, beside the model's own children.

    Where a mask chooses elements, all are taken to be chosen. Raises ValueError when the step does not call `f()`,
    torch's DataDependentOutputException or DynamicOutputShapeException where memory depends on the data in another way
    and NotImplementedError for an operator on sparse tensors that can't be run without data, each with the name of the
    operator, and whatever the step raises.
    """
    with Dataless(at_most=True), dataless_tensors(model):
        return observe(model, [_dataless(tensor) for tensor in batch], step, make_optimizer, blocks)


def predict(model: nn.Module, batch: Iterable[Tensor], step: Step, make_optimizer: MakeOptimizer) -> Memory:
    """Returns the headline figures of `profile`."""
    return profile(model, batch, step, make_optimizer).memory


def saved_bytes(function: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Returns the bytes that autograd saves for backward while `function()` runs: each storage once and whole.

    The parameters and buffers of `model` don't count: they are there anyway.
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())} if model else set()
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        """Notes the storage of a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # noqa: F841  held until the count is done
    return sum(storage.nbytes() for storage in saved.values())


def inputs_of(model: nn.Module, batch: Tensor | Sequence[Tensor] | Sequence[int]) -> list[Tensor]:
    """Returns the tensors that a model is called with, as described: one, several, or the shape of one.

    A shape stands for a tensor on the meta device in the dtype of the weights. Raises ValueError for what is neither.
    """
    if isinstance(batch, Tensor):
        return [batch]
    tensors = [item for item in batch if isinstance(item, Tensor)]
    shape = [item for item in batch if isinstance(item, int) and item > 0]
    if tensors and len(tensors) == len(batch):
        return tensors
    if not shape or len(shape) < len(batch):
        raise ValueError(
            f"batch={list(batch)}: expected tensors, or a shape of integers of at least 1, such as (64, 3, 224, 224)"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return [torch.empty(shape, device="meta", dtype=dtype)]


@contextmanager
def dataless_tensors(model: nn.Module) -> Iterator[None]:
    """Replaces the parameters and buffers of `model` by dataless CPU tensors; then restores the very same objects.

    A copy of the model would not do: its hooks would still point to the modules of the original. What a module keeps
    for itself in a forward pass, as a table of positions that is made once, is forgotten again: nobody has written to
    it.
    """
    modules = list(model.modules())
    attributes = [Attributes(module) for module in modules]
    tables: list[dict[str, Any]] = [table for module in modules for table in (module._parameters, module._buffers)]
    originals = [dict(table) for table in tables]
    training = [module.training for module in modules]
    # Tied tensors stay tied.
    dataless = {id(t): _dataless(t) for table in originals for t in table.values() if t is not None}
    try:
        for table in tables:
            table.update((name, dataless[id(t)]) for name, t in table.items() if t is not None)
        yield
    finally:
        for table, original in zip(tables, originals, strict=True):
            table.clear()
            table.update(original)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for own in attributes:
            own.restore()


def _dataless(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor of the same shape and type that nobody has written to."""
    dataless = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        dataless = nn.Parameter(dataless, requires_grad=tensor.requires_grad)
        vars(dataless).update(vars(tensor))
    return dataless


def _few(batch: list[Tensor]) -> list[Tensor]:
    """Returns the first samples of a batch, or the whole where its tensors differ in their number of samples."""
    counts = {len(tensor) if tensor.dim() else 0 for tensor in batch}
    return [tensor[:FEW] for tensor in batch] if len(counts) == 1 else batch
