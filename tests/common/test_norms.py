"""The gradient of a LayerNorm's bias beside a frozen weight, which PyTorch loses on CUDA for many rows."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli.common import norms
from s2a_cli.common.norms import forget_bias_gradient, keep_bias_gradient
from s2a_cli.config.compose import compose
from s2a_cli.training.run import build
from s2a_cli.training.step import Step


class Masks(TorchDispatchMode):
    """Notes which gradients of a LayerNorm are asked for: of its input, its weight and its bias."""

    def __init__(self):
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_layer_norm_backward.default:
            self.seen.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def gradients(norm: nn.Module, x: torch.Tensor, listed: bool = False) -> list[torch.Tensor]:
    """Returns what a norm computes, and the gradients of its input and its bias."""
    norm.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    if listed:  # as blocks that are computed again do
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, norm.bias])]
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


@pytest.fixture
def lent(monkeypatch) -> list[torch.Size]:
    """Has the gradient lost everywhere; returns the shapes of the inputs for which it is."""
    seen: list[torch.Size] = []
    monkeypatch.setattr(norms, "_loses_gradient", lambda x, weight: seen.append(x.shape) or True)
    return seen


def test_the_gradient_of_the_weight_is_asked_for_where_that_of_the_bias_would_be_lost(norm, lent):
    x, weight = torch.randn(5, 6), norm.weight
    expected = gradients(norm, x)
    keep_bias_gradient(norm)
    keep_bias_gradient(norm)  # once is enough
    assert len(norm._forward_pre_hooks) == len(norm._forward_hooks) == 1
    for one, listed in itertools.product((norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))), (False, True)):
        with Masks() as masks:
            found = gradients(one, x, listed)
        assert masks.seen == [[True, True, True]]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert one.weight.grad is None and not one.weight.requires_grad and isinstance(one.weight, nn.Parameter)
    assert norm.weight is weight and len(lent) == 6
    with pytest.raises(RuntimeError):
        norm(torch.randn(5, 7))
    with torch.no_grad():
        norm(x)
    assert norm.weight is weight and len(lent) == 7  # nothing is lent without a gradient
    norm.weight.requires_grad_(True)
    gradients(norm, x)
    assert norm.weight.grad is not None and len(lent) == 7
    forget_bias_gradient(norm)
    assert not norm._forward_pre_hooks and not norm._forward_hooks and not norm._forward_hooks_always_called


@pytest.mark.parametrize("quant", ["int4", "exact", "quant.recompute=block"])
def test_what_is_kept_and_learned_is_the_same(quant, lent, monkeypatch):
    words = ["backbone=vit_t", "backbone.pretrained=false", "backbone.image_size=32", "dataset=cifar10", "method=bias"]
    words += ["method.blocks=last:10", quant if "=" in quant else f"quant={quant}", "optim.batch_size=2", "device=cpu"]
    config = compose(words)
    torch.manual_seed(0)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])

    def learned() -> tuple[int, list[torch.Tensor]]:
        attached, _ = build(config, 10)
        attached.model.train()
        step, kept = Step(config, torch.device("cpu"), attached), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = step.losses(attached.model, images, targets).sum()
        loss.backward()
        return sum(kept), [p.grad for p in attached.model.parameters() if p.requires_grad]

    bytes_kept, found = learned()
    assert lent
    monkeypatch.setattr(norms, "_loses_gradient", lambda x, weight: False)
    expected = learned()
    assert bytes_kept == expected[0] and all(map(torch.equal, found, expected[1]))


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
