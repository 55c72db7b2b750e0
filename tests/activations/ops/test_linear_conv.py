"""A linear layer whose bias trains alone, as it runs on CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations import compress_activations
from s2a_cli.activations.chunk_sizes import planned_for
from s2a_cli.activations.ops.linear_conv import bias_gradient
from s2a_cli.config.schema import QuantConfig
from s2a_cli.memory.predict import saved_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 7), (3, 50, 7), (2, 9, 5, 7), (1, 300, 7)])
def test_the_gradient_of_a_bias_is_the_exact_sum_rounded_once(shape, dtype):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = grad.double().flatten(0, -2).sum(0)
    with planned_for("cuda"):
        found = bias_gradient(grad)
    assert found.dtype == dtype
    scale = grad.double().abs().flatten(0, -2).sum(0)
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * scale).all()


@pytest.mark.parametrize("computing", [None, torch.bfloat16])
def test_a_frozen_weight_with_a_trained_bias(computing):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 20, 6), (5, 6), (5,)))
    found = []
    for device in (None, "cuda"):
        inputs = x.clone().requires_grad_(), weight, bias.clone().requires_grad_()
        with planned_for(device or "cpu"), torch.autocast("cpu", computing, enabled=computing is not None):
            with compress_activations(QuantConfig(lossless=True)):
                y = F.linear(*inputs)
            y.mul_(y.detach().sign())  # in place, as a caller may
            y.float().square().sum().backward()
        found.append((y.detach(), inputs[0].grad, inputs[2].grad))
    (y, dx, dbias), (planned, planned_dx, planned_dbias) = found
    assert torch.equal(y, planned) and torch.equal(dx, planned_dx) and planned_dbias.dtype == torch.float32
    torch.testing.assert_close(planned_dbias, dbias, rtol=1e-2 if computing else 1e-5, atol=1e-4)


def test_it_keeps_nothing_of_its_input():
    x, weight = torch.randn(3, 20, 6, requires_grad=True), torch.randn(5, 6)
    bias = torch.zeros(5, requires_grad=True)
    with planned_for("cuda"), compress_activations(QuantConfig(lossless=True)):
        assert saved_bytes(lambda: F.linear(x, weight, bias)) == weight.numel() * weight.element_size()


def test_what_a_frozen_kernel_does_otherwise_is_left_to_stock():
    x, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    spectrum, kernel = torch.randn(2, 3, 8, 8, dtype=torch.cfloat, requires_grad=True), torch.randn(4, 3, 3, 3).cfloat()
    for run, given in (
        (lambda: F.conv_transpose2d(x, weight, stride=1, dilation=2, output_padding=1), x),
        (lambda: F.conv_transpose2d(x, weight, stride=2, output_padding=1), x),
        (lambda: F.conv2d(spectrum, kernel * (1 + 2j)).abs(), spectrum),
    ):
        (expected,) = torch.autograd.grad(run().square().sum(), given)
        with compress_activations("exact", []):
            y = run()
        (found,) = torch.autograd.grad(y.square().sum(), given)
        torch.testing.assert_close(found, expected)
