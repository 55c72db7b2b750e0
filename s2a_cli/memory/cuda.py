"""Models what a CUDA device does differently from the CPU tensors that a prediction runs on.

Two differences are part of a predicted peak, because PyTorch's documentation leaves no doubt: requests are rounded up
to 512 bytes, and autocast runs more operators in fp32 than on a CPU (`CudaAutocast`). Others are reported beside the
peak as bounds or estimates: `differences`, and what the allocator takes from the device (allocator.py). Not modelled
are the kernels' own temporaries and NCCL's buffers. Neither is that autograd adds two gradients of one tensor in place
where it can: a peak on a residual connection may be one gradient too high.
"""

from __future__ import annotations

import math
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


# CUBLAS_WORKSPACE_CONFIG=:4096:8, which a run sets for determinism, is 8 buffers of 4096 KiB for each thread: that of
# the forward pass and autograd's. Measured on an H200 (benchmarks/cuda).
CUBLAS_MIB = 65
# What the sum of many rows to one takes, as in the gradient of a bias: up to 1 MiB for each multiprocessor, of which an
# H200 has 132 and small devices a fifth. Seen in a snapshot of its allocator.
ROW_SUMS_MIB = 132


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
        ),
        Difference("sums of rows", ROW_SUMS_MIB, True, "of stock PyTorch's gradients of biases, while one is computed"),
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
