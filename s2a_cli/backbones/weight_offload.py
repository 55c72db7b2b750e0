"""Holds frozen weights in the memory of the host, and brings them to the device block by block, ahead of their use.

The device has two buffers, each as large as the largest block. While one block computes, the weights of the next one
are copied into the other buffer, on a stream of its own: forward those of the block behind it, backward those of the
block ahead. Two buffers of our own need no allocator to wait for streams, and their memory is known beforehand.

Autograd keeps no weight. Of what an operator saves of one it keeps a note, and the weight is fetched again when the
backward pass asks for it. Operators, and so results, are those of weights that stay, to the bit.

On a CPU nothing is copied: layers compute with the weights where they lie. Those of a .safetensors file are the
system's cache of that file, and no memory of the process (pretrained.map_tensors).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from s2a_cli.activations.chunk_sizes import planned_device
from s2a_cli.backbones.stored import Stored, computing_dtype

if TYPE_CHECKING:
    from s2a_cli.backbones.backbone import Backbone

NAME = "offload"  # the submodule of the model that holds the buffers
ALIGNED = 128  # elements: each weight in a buffer begins at a multiple, as tensors of their own do


@dataclass(frozen=True)
class Place:
    """Says where a layer's weight is in the buffers: elements `start` to `stop`, when block number `block` is there."""

    buffers: Buffers
    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Note:
    """Stands for what autograd would keep of a weight: a view of it."""

    layer: Offloaded
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements, from the beginning of the weight

    def tensor(self) -> Tensor:
        """Returns that view of the weight, which is fetched again."""
        weight = self.layer.fetched(self.device, self.dtype)
        return weight.as_strided(self.size, self.stride, weight.storage_offset() + self.offset)


class Offloaded(Stored):
    """A layer whose weight lies in the memory of the host. No module may keep the weight that `run` is given."""

    FORM = ("host", "place")
    host: Tensor  # a plain attribute: Module.to leaves it where it is
    place: Place

    def take(self, weight: Tensor) -> None:
        super().take(weight)
        self.host = weight

    @property
    def weight(self) -> Tensor:
        """Returns a copy on the layer's device; on a CPU the weight itself."""
        return self.host.to(self.like.device, self.like.dtype)

    def fetched(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the weight on a device. On CUDA it stays valid until two other blocks have been fetched."""
        if planned_device(device) == "cpu":
            return self.host.to(dtype)
        buffers, place = self.place.buffers, self.place
        if buffers.dtype != dtype or buffers.device != device:  # such as in fp32 within autocast
            return self.host.to(device, dtype, copy=True)
        return buffers.fetched(place.block)[place.start : place.stop].view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        device, dtype = x.device, computing_dtype(x)
        weight = self.fetched(device, dtype)
        storage, start = weight.untyped_storage()._cdata, int(weight.storage_offset())

        def pack(saved: Tensor) -> Tensor | Note:
            if saved.untyped_storage()._cdata != storage:
                return saved
            return Note(self, device, dtype, saved.size(), saved.stride(), int(saved.storage_offset()) - start)

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
            return self.run(x, weight, self.bias)


def _unpacked(saved: Tensor | Note) -> Tensor:
    return saved.tensor() if isinstance(saved, Note) else saved


class OffloadedLinear(Offloaded, nn.Linear):
    """A Linear whose weight [out, in] lies in the memory of the host."""


class OffloadedConv2d(Offloaded, nn.Conv2d):
    """A Conv2d whose weight [out, in / groups, H, W] lies in the memory of the host."""


class Buffers(nn.Module):
    """The two buffers on the device, and what is in them."""

    stores_weights = True
    a: Tensor
    b: Tensor

    def __init__(self, blocks: Sequence[Sequence[Offloaded]], like: Tensor):
        super().__init__()
        self.blocks = blocks
        most = max(self._arrange(number) for number in range(len(blocks)))
        for name in "ab":
            self.register_buffer(name, like.new_empty(most), persistent=False)
        self._forget()

    def _arrange(self, number: int) -> int:
        """Gives the layers of a block their places, and returns how many elements they take."""
        end = 0
        for layer in self.blocks[number]:
            layer.place = Place(self, number, end, end + layer.elements)
            end += -(-layer.elements // ALIGNED) * ALIGNED
        return end

    def _forget(self) -> None:
        self._current = -1  # the block that computes
        self._held: list[tuple[weakref.ref[Tensor], int] | None] = [None, None]  # the buffer and the block in it
        self._ready: list[Any] = [None, None]  # the event behind which it is there
        self._pinned: dict[int, Tensor] = {}  # block -> its weights as in a buffer, which a device reads by itself
        self._stream: Any = None  # for copies

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out streams and events, of which a copy has its own."""
        state = self.__dict__.copy()
        for name in ("_current", "_held", "_ready", "_pinned", "_stream"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def device(self) -> torch.device:
        return self.a.device

    def fetched(self, block: int) -> Tensor:
        """Returns the buffer that holds this block's weights, and begins to copy those of the block to come."""
        slot = self._slot(block)
        if slot is None:
            slot = 1 - (self._slot(self._current) or 0)
            self._copy(block, slot)
        if block != self._current:
            self._current = block
            is_backward = torch._C._current_autograd_node() is not None
            ahead = block - 1 if is_backward else block + 1
            if 0 <= ahead < len(self.blocks) and self._slot(ahead) is None:
                self._copy(ahead, 1 - slot)
        if self._ready[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[slot])
        return (self.a, self.b)[slot]

    def _slot(self, block: int) -> int | None:
        """Returns which buffer holds a block; None where none does, or where the buffers are others by now."""
        for slot, (held, buffer) in enumerate(zip(self._held, (self.a, self.b))):
            if held and held[0]() is buffer and held[1] == block:
                return slot
        return None

    @torch.no_grad()
    def _copy(self, block: int, slot: int) -> None:
        """Copies a block's weights into a buffer, behind all that computes with what is there."""
        buffer = (self.a, self.b)[slot]
        self._held[slot], self._ready[slot] = (weakref.ref(buffer), block), None
        if not buffer.is_cuda:
            for layer in self.blocks[block]:
                buffer[layer.place.start : layer.place.stop].view(layer.shape).copy_(layer.host)
            return
        pinned = self._pin(block, buffer.dtype)
        self._stream = self._stream or torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            buffer[: len(pinned)].copy_(pinned, non_blocking=True)
            self._ready[slot] = self._stream.record_event()

    def _pin(self, block: int, dtype: torch.dtype) -> Tensor:
        """Returns a block's weights in memory that a device reads without the host, as they lie in a buffer."""
        pinned = self._pinned.get(block)
        if pinned is None or pinned.dtype != dtype:
            layers = self.blocks[block]
            pinned = self._pinned[block] = torch.empty(
                layers[-1].place.stop, dtype=dtype, device="cpu", pin_memory=True
            )
            for layer in layers:
                own = pinned[layer.place.start : layer.place.stop].view(layer.shape).copy_(layer.host)
                if layer.host.dtype == dtype:
                    layer.host = own
        return pinned


def prepare(backbone: Backbone, layers: Sequence[Offloaded], dtype: torch.dtype | None) -> None:
    """Gives the model of these layers its buffers, in the dtype of the weights or the one in which they compute."""
    blocks = cast(list[list[Offloaded]], backbone.in_order(layers))
    like = layers[0].like
    backbone.model.add_module(NAME, Buffers(blocks, like.to(dtype or like.dtype)))


def remove(model: nn.Module) -> None:
    """Removes the buffers, if there are any."""
    if isinstance(getattr(model, NAME, None), Buffers):
        delattr(model, NAME)
