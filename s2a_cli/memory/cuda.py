"""Models what a CUDA device does differently from the CPU tensors that a prediction runs on.

Two differences are part of a predicted peak, because PyTorch's documentation leaves no doubt: requests are rounded up
to 512 bytes, and autocast runs more operators in fp32 than on a CPU (`CudaAutocast`). Others are reported beside the
peak as bounds or estimates, because no CUDA device has confirmed them: `differences`, and what the allocator takes from
the device (`reserved`). Not modelled are the kernels' own temporaries and NCCL's buffers. Neither is that autograd adds
two gradients of one tensor in place where it can: a peak on a residual connection may be one gradient too high.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from s2a_cli.memory.result import MIB
from s2a_cli.memory.tracker import Call

# "CUDA Ops that can autocast to float32" of PyTorch's AMP documentation, those that a CPU leaves in 16 bits.
IN_FP32 = {
    *(F.softmax, F.log_softmax, F.layer_norm, F.group_norm, F.cosine_similarity, F.softplus, F.softmin),
    *(torch.softmax, torch.log_softmax, torch.layer_norm, torch.group_norm, torch.norm),
    *(torch.exp, torch.log, torch.pow, torch.rsqrt),
    *(torch.Tensor.softmax, torch.Tensor.log_softmax, torch.Tensor.norm),
    *(torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow),
}


class CudaAutocast(TorchFunctionMode):
    """Runs the operators of IN_FP32 in fp32 within `torch.autocast("cpu")`, as autocast for "cuda" does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(map(_in_fp32, args)), {key: _in_fp32(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)


def _in_fp32(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


CUBLAS_MIB = 32  # CUBLAS_WORKSPACE_CONFIG=:4096:8, which a run sets for determinism: 8 buffers of 4096 KiB


@dataclass(frozen=True)
class Difference:
    """What CUDA is expected to add to the peak, in MiB; a bound where it says so."""

    name: str
    mib: float
    is_bound: bool
    why: str


def attention_kernel(dtype: torch.dtype, head: int, masked: bool) -> str:
    """Returns which kernel of scaled_dot_product_attention CUDA takes: flash | memory-efficient | unfused.

    head: channels of a head. Follows the constraints that PyTorch documents. Flash takes fp16 and bf16, heads of at
    most 256 and no mask. Memory-efficient takes also fp32 and masks, and heads that are a multiple of 4 in fp32 and of
    8 in 16 bits.
    """
    if dtype in (torch.float16, torch.bfloat16) and head <= 256 and not masked:
        return "flash"
    multiple = 4 if dtype == torch.float32 else 8
    return "memory-efficient" if head % multiple == 0 and dtype != torch.float64 else "unfused"


def differences(calls: Iterable[Call]) -> list[Difference]:
    """Returns what CUDA adds to the peak of a step with these attentions and convolutions; untested on a device."""
    found = [
        Difference(
            "cuBLAS workspace", CUBLAS_MIB, False, "CUBLAS_WORKSPACE_CONFIG=:4096:8, held by PyTorch's allocator"
        )
    ]
    fused = [call for call in calls if "scaled_dot_product" in call.operator and call.keeps]
    for kernel in ("flash", "memory-efficient", "unfused"):
        chosen = [call for call in fused if attention_kernel(call.dtype, call.inputs[0][-1], call.masked) == kernel]
        if chosen:
            more = sum(_attention_extra(call, kernel) for call in chosen)
            why = {
                "flash": "keeps what the prediction keeps; heads are padded to a multiple of 8",
                "memory-efficient": "the logsumexp is padded to a multiple of 32 tokens",
                "unfused": "no fused kernel takes it: the map is written out and kept",
            }[kernel]
            found.append(Difference(f"{kernel} attention, {len(chosen)} calls", more / MIB, False, why))
    workspaces = [_unfolded(call) for call in calls if call.operator == "aten::convolution"]
    if workspaces:
        why = "the input of the largest convolution, unfolded; chosen by cuDNN, often 0"
        found.append(Difference("cuDNN workspace", max(workspaces) / MIB, True, why))
    return found


def _attention_extra(call: Call, kernel: str) -> int:
    """Returns the bytes that a call of [B, heads, N, d] keeps on CUDA and not on a CPU."""
    *batch, tokens, head = call.inputs[0]
    rows, keys, size = math.prod(batch), call.inputs[1][-2], call.dtype.itemsize
    if kernel == "flash":
        return 0 if head % 8 == 0 else rows * tokens * size * 4 * (-head % 8)
    if kernel == "memory-efficient":
        return rows * (-tokens % 32) * 4
    return rows * tokens * keys * size


def _unfolded(call: Call) -> int:
    """Returns the bytes of a convolution's unfolded input: [B, positions, channels x window].

    A 1 x 1 convolution needs none.
    """
    weight, out = call.inputs[1], call.outputs[0]
    return out[0] * math.prod(out[2:]) * math.prod(weight[1:]) * call.dtype.itemsize if math.prod(weight[2:]) > 1 else 0


# Of c10/cuda/CUDACachingAllocator: kSmallSize, kMinLargeAlloc, kRoundLarge, kSmallBuffer, kLargeBuffer.
SMALL, LARGE, ROUND = 1 * MIB, 10 * MIB, 2 * MIB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB


class Allocator:
    """Simulates PyTorch's caching allocator for CUDA with its default settings.

    Requests up to 1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, others from segments of
    their own in steps of 2 MiB. The smallest free block that fits is taken, and split where enough remains. Free
    neighbours are joined. Segments are never given back, because a device that is not full gives no cause to.
    """

    def __init__(self) -> None:
        self.reserved = 0  # bytes
        # small or not -> [(bytes, address)] of the free blocks, sorted
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._size: dict[int, int] = {}  # address -> bytes of every block
        self._after: dict[int, int] = {}  # address -> that of the next block in the segment
        self._ahead: dict[int, int] = {}  # address -> that of the block before
        self._small: dict[int, bool] = {}  # address -> whether it is of a segment for small requests
        self._next = 0  # address of the next segment

    def take(self, size: int) -> int:
        """Returns the address of a new block of `size` bytes, a multiple of 512."""
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        if place < len(free):
            _, address = free.pop(place)
        else:
            address = self._segment(size, small)
        rest = self._size[address] - size
        if rest >= 512 if small else rest > SMALL:
            self._split(address, size, small)
        return address

    def give(self, address: int) -> None:
        """Frees a block, and joins it with free neighbours."""
        small = self._small[address]
        if (after := self._after.get(address)) is not None and self._is_free(small, after):
            self._free[small].remove((self._size[after], after))
            self._join(address, after)
        if (ahead := self._ahead.get(address)) is not None and self._is_free(small, ahead):
            self._free[small].remove((self._size[ahead], ahead))
            self._join(ahead, address)
            address = ahead
        insort(self._free[small], (self._size[address], address))

    def _is_free(self, small: bool, address: int) -> bool:
        free, item = self._free[small], (self._size[address], address)
        place = bisect_left(free, item)
        return free[place : place + 1] == [item]

    def _segment(self, size: int, small: bool) -> int:
        length = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
        self.reserved += length
        address, self._next = self._next, self._next + length
        self._size[address], self._small[address] = length, small
        return address

    def _split(self, address: int, size: int, small: bool) -> None:
        rest = address + size
        self._size[rest], self._small[rest] = self._size[address] - size, small
        self._size[address] = size
        self._link(rest, self._after.pop(address, None))
        self._link(address, rest)
        insort(self._free[small], (self._size[rest], rest))

    def _join(self, first: int, second: int) -> None:
        self._size[first] += self._size.pop(second)
        self._ahead.pop(second, None)
        self._link(first, self._after.pop(second, None))

    def _link(self, first: int, second: int | None) -> None:
        if second is None:
            self._after.pop(first, None)
        else:
            self._after[first], self._ahead[second] = second, first


def reserved(timeline: Iterable[tuple[int, int]], begins_at: int, steps: int = 3) -> int:
    """Returns the bytes that the allocator has taken from the device after some steps, fragmentation included.

    timeline: (number of an allocation, bytes; below zero where it is released), of which the first `begins_at` precede
    the step.
    """
    allocator, places = Allocator(), {}
    timeline = list(timeline)
    for entry in (*timeline[:begins_at], *timeline[begins_at:] * steps):
        number, size = entry
        if size > 0:
            places[number] = allocator.take(size)
        elif number in places:
            allocator.give(places.pop(number))
    return allocator.reserved
