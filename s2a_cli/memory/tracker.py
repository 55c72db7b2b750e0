"""Counts the bytes of tensors that are alive, and records when each came and went, and what it was for."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]  (missing in torch's stubs)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2a_cli.memory.families import reads

ALLOCATION = 512  # bytes; CUDA's caching allocator rounds each request up to a multiple


WATCHED = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("convolution", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu")
)


WITHOUT_KERNEL = {  # operators that launch none of their own, beside views
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


class Allocation:
    """The record of one storage.

    bytes: rounded up. use: what it is for; empty until known. operator: that made it. place: in the model.
    """

    __slots__ = ("bytes", "operator", "place", "readers", "use")

    def __init__(self, bytes: int, operator: Any, place: str):
        self.bytes, self.use, self.operator, self.place = bytes, "", operator, place
        self.readers: set[str] = set()  # families of operators that read it in a forward pass, and may keep it


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors with storages that a tensor is made of: indices and values of a sparse one, or itself."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


class Call(NamedTuple):
    """A call of an operator that CUDA runs in another way than a CPU."""

    operator: str  # its name, such as aten::convolution
    inputs: tuple[tuple[int, ...], ...]  # shapes of its tensors, in order
    outputs: tuple[tuple[int, ...], ...]
    dtype: torch.dtype  # of its first tensor
    masked: bool  # with attn_mask
    keeps: bool  # in a forward pass with gradients: what it keeps for the backward pass is alive behind it


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators return while it is active, until each is freed.

    Storages are counted, not tensors: a view or an in-place result costs nothing, and a small view keeps all of its
    base alive, as it does on a device. `add` registers tensors that exist already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes
        self.peak = 0  # bytes, since the start or the last reset()
        self.peak_at = 0  # how many events were before it
        self.events: list[tuple[Allocation, bool]] = []  # what came (True) or went (False), in order
        self.place = ""  # in the model, of what runs now
        self.reading = False  # whether a forward pass runs: what reads a tensor then may keep it
        self.calls: list[Call] = []  # attention and convolutions of this step
        self.operators = 0  # dispatched in this step, those apart that launch no kernel
        self._storages: dict[int, tuple[weakref.ref, Allocation]] = {}  # address -> the storage, its record
        self._bounds: list[int] = []  # autograd's sequence number where the place changed in a forward pass
        self._places: list[str] = []  # and to which

    def add(self, tensors: Iterable[Tensor], operator: Any = None) -> None:
        """Counts the storages of `tensors`, where they are not counted yet."""
        for part in (part for tensor in tensors for part in dense_parts(tensor)):
            storage = part.untyped_storage()
            address, size = storage._cdata, -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            reference, known = self._storages.get(address, (None, None))
            if size == (known.bytes if known else 0):
                continue
            if known:  # resized
                self._log(known, False)
            if reference is None:  # called back when the last tensor on it dies, in Python or in the autograd graph
                reference = weakref.ref(storage, lambda _, address=address: self._forget(address))
            allocation = Allocation(size, operator, self._here())
            self._storages[address] = (reference, allocation)
            self._log(allocation, True)
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, len(self.events)

    def allocation(self, tensor: Tensor) -> Allocation | None:
        """Returns the record of a tensor's storage, or of its values'; None where it is not counted, or empty."""
        return self._storages.get(dense_parts(tensor)[-1].untyped_storage()._cdata, (None, None))[1]

    def alive(self) -> Iterator[Allocation]:
        """Returns the records of all storages that are alive."""
        return (allocation for _, allocation in self._storages.values())

    def reset(self) -> None:
        """Forgets all records but those of what is alive."""
        self.peak, self.peak_at = self.live, 0
        self.events.clear()
        self.calls.clear()
        self.operators = 0

    def moved(self, place: str) -> None:
        """Notes that the forward pass goes on in this place.

        Its backward pass will be recognised by autograd's sequence numbers.
        """
        self.place = place
        self._bounds.append(_autograd._get_sequence_nr())
        self._places.append(place)

    def _here(self) -> str:
        """Returns the place of what runs now; in a backward pass, that of the forward pass before it."""
        node = torch._C._current_autograd_node()
        # Larger numbers are of an accumulation (2^63 and more), or of what a backward pass computes again.
        if node is not None and self._bounds and node._sequence_nr() < self._bounds[-1]:
            number = node._sequence_nr()
            self.place = self._places[max(0, bisect_right(self._bounds, number) - 1)]
        return self.place

    def _log(self, allocation: Allocation, came: bool) -> None:
        self.events.append((allocation, came))
        self.live += allocation.bytes if came else -allocation.bytes

    def _forget(self, address: int) -> None:
        self._log(self._storages.pop(address)[1], False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operators += not func.is_view and func not in WITHOUT_KERNEL
        results = [out] if isinstance(out, Tensor) else [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.add(results, func)
        if self.reading and (keeper := reads(func)):
            for argument in args:
                known = self.allocation(argument) if isinstance(argument, Tensor) else None
                if known:
                    known.readers.add(keeper)
        if func in WATCHED:
            given = [argument for argument in args if isinstance(argument, Tensor)]
            inputs, outputs = (tuple(tuple(tensor.shape) for tensor in tensors) for tensors in (given, results))
            masked, keeps = kwargs.get("attn_mask") is not None, self.reading and torch.is_grad_enabled()
            self.calls.append(Call(func._schema.name, inputs, outputs, given[0].dtype, masked, keeps))
        return out
