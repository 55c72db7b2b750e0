"""The gradient of a LayerNorm's bias beside a frozen weight, which PyTorch loses on CUDA for many rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from s2a_cli.common import norms
from s2a_cli.common.norms import forget_bias_gradient, keep_bias_gradient


def gradients(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    norm.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, norm.bias.grad]


@pytest.fixture
def norm() -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.requires_grad_(False)
    return norm


def test_a_frozen_weight_is_lent_a_gradient_where_the_bias_would_lose_its_own(norm, monkeypatch):
    x, weight, seen = torch.randn(5, 6), norm.weight, []
    expected = gradients(norm, x)
    keep_bias_gradient(norm)
    keep_bias_gradient(norm)  # once is enough
    assert len(norm._forward_pre_hooks) == len(norm._forward_hooks) == 1
    monkeypatch.setattr(norms, "_loses_gradient", lambda x, weight: seen.append(x.shape) or True)
    for one in (norm, copy.deepcopy(norm)):
        found = gradients(one, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert one.weight.grad is None and not one.weight.requires_grad
    assert norm.weight is weight and len(seen) == 2
    with pytest.raises(RuntimeError):
        norm(torch.randn(5, 7))
    with torch.no_grad():
        norm(x)
    assert norm.weight is weight and len(seen) == 3  # nothing is lent without a gradient
    norm.weight.requires_grad_(True)
    assert torch.is_tensor(gradients(norm, x)[2]) and norm.weight.grad is not None and len(seen) == 3
    forget_bias_gradient(norm)
    assert not norm._forward_pre_hooks and not norm._forward_hooks and not norm._forward_hooks_always_called


def test_other_modules_are_left_alone():
    linear = nn.Linear(2, 2)
    keep_bias_gradient(linear)
    assert not linear._forward_pre_hooks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_keeps_its_gradient_on_cuda(norm, dtype):
    x = torch.randn(norms.MANY_ROWS + 1, 6, dtype=dtype)
    expected = gradients(copy.deepcopy(norm).double(), x.double())
    norm = norm.to("cuda", dtype)
    keep_bias_gradient(norm)
    for ours, reference in zip(gradients(norm, x.cuda()), expected, strict=True):
        assert (ours.cpu().double() - reference).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * reference.norm()
