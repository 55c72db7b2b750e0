"""What CUDA does differently: the allocator on numbers, autocast's list, the choice of attention kernels.

No device is asked.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.common.dataless import Dataless
from s2a_cli.memory import Tracker
from s2a_cli.memory.cuda import CudaAutocast, attention_kernel, differences
from s2a_cli.memory.result import MIB


@pytest.mark.parametrize("function", [F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax])
def test_softmax_runs_in_fp32_under_autocast(function):
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        assert function(x, -1).dtype == torch.float32
        assert F.layer_norm(x, (4,)).dtype == torch.float32
        assert F.gelu(x).dtype == torch.bfloat16
    with CudaAutocast():
        assert function(x, -1).dtype == torch.bfloat16
        assert function(x.double(), -1).dtype == torch.float64


@pytest.mark.parametrize(
    "dtype, head, masked, kernel",
    [
        (torch.float32, 64, False, "memory-efficient"),
        (torch.bfloat16, 64, False, "flash"),
        (torch.bfloat16, 64, True, "memory-efficient"),
        (torch.float16, 512, False, "memory-efficient"),
        (torch.float32, 30, False, "unfused"),
        (torch.float64, 64, False, "unfused"),
    ],
)
def test_the_kernel_of_attention(dtype, head, masked, kernel):
    assert attention_kernel(dtype, head, masked) == kernel


def test_differences_of_a_step():
    with Dataless(), Tracker() as tracker:
        tracker.reading = True
        q = torch.empty(2, 3, 50, 64, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q)
        F.conv2d(torch.empty(4, 3, 32, 32, requires_grad=True), torch.empty(8, 3, 5, 5))
    found = {d.name: d for d in differences(tracker.calls)}
    assert found["memory-efficient attention, 1 calls"].mib * MIB == 2 * 3 * 14 * 4  # 50 tokens padded to 64
    workspace = found["cuDNN workspace"]
    assert workspace.is_bound and workspace.mib * MIB == 4 * 28 * 28 * 3 * 5 * 5 * 4
