"""Stochastic rounding: unbiased, of its own random numbers, the same again from the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli.activations import compress_activations
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.primitives import dequantize_groupwise, quantize_groupwise
from s2a_cli.config.schema import QuantConfig


def stochastic(**settings) -> QuantConfig:
    return QuantConfig(name="test", rounding="stochastic", **settings)


def gradient(run, x: torch.Tensor, memory) -> torch.Tensor:
    with memory:
        out = run(x)
    return torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("function", [F.gelu, F.silu, F.hardswish, F.elu, torch.tanh])
def test_the_mean_of_draws_converges_to_the_exact_gradient(function, bits):
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) - 0.5).requires_grad_()
    exact = torch.autograd.grad(function(x).sum(), x)[0]
    torch.manual_seed(0)
    memory = compress_activations(stochastic(pointwise=bits))
    draws = torch.stack([gradient(function, x, memory) for _ in range(100)])
    one = (draws[0] - exact).norm()
    for count in (4, 25, 100):
        error = (draws[:count].mean(0) - exact).norm()
        assert 0.9 < error * count**0.5 / one < 1.1
    # 2 million draws: the mean error itself, of which nearest rounding keeps all
    assert abs((draws - exact).mean()) < 4 * (draws - exact).std() / draws.numel() ** 0.5 + 1e-5


def test_nearest_rounding_does_not_converge():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    memory = compress_activations(QuantConfig(name="test", pointwise=2))
    draws = [gradient(F.gelu, x, memory) for _ in range(3)]
    assert torch.equal(draws[0], draws[1]) and (draws[0] - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("make", [codebooks.signed, codebooks.unit])
def test_grouped_values_are_unbiased(bits, make):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x = x if make is codebooks.signed else x.softmax(-1)
    table = make(bits, 64, x, True) if make is codebooks.signed else make(bits, x, True)
    total, one = torch.zeros_like(x), None
    for seed in range(400):
        codes, scales = quantize_groupwise(x, table.bin_codes, table.low, 64, bits, table.chances, seed)
        total += dequantize_groupwise(codes, scales, table.entries, 64, 64, bits, 0, 40, x.dtype)
        one = (total - x).norm() if one is None else one
    error = (total / 400 - x).norm()
    assert error < 1.15 * one / 20 + 3e-4 * x.norm()  # the bins' width is the rest


def test_levels_for_stochastic_rounding_span_the_range():
    like = torch.zeros(())
    for bits in range(1, 9):
        assert codebooks.signed(bits, 64, like, True).entries[[0, -1]].tolist() == [-1, 1]
        assert codebooks.unit(bits, like, True).entries[[0, -1]].tolist() == [0, 1]
        gelu = codebooks.pointwise(F.gelu, {}, bits, like, True).entries
        assert gelu[0] == pytest.approx(-0.1289, abs=1e-4) and gelu[-1] == pytest.approx(1.1289, abs=1e-4)


def test_its_variance_is_the_least():
    values = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values
    weights = torch.ones_like(values)

    def variance(chosen):
        below = torch.bucketize(values, chosen[1:-1], right=True)
        return ((values - chosen[below]) * (chosen[below + 1] - values)).sum()

    best = variance(codebooks.spanning_entries(values, weights, 2))
    inner = values[torch.randint(1, 199, (300, 2), generator=torch.Generator().manual_seed(1))].sort(-1).values
    assert all(best <= variance(torch.cat([values[:1], pair, values[-1:]])) + 1e-4 for pair in inner)


def test_the_global_random_numbers_are_not_touched():
    x = torch.randn(4, 6, 64, requires_grad=True)

    def run(x):
        return F.dropout(F.scaled_dot_product_attention(*[F.gelu(F.layer_norm(x, (64,)))] * 3), 0.5)

    outs, after = [], []
    for memory in (
        compress_activations(stochastic(pointwise=4, norm=4, attention=4)),
        compress_activations(QuantConfig(name="stock")),
    ):
        torch.manual_seed(3)
        with memory:
            outs.append(run(x).detach())
        after.append(torch.rand(1))
    assert torch.equal(*outs) and torch.equal(*after)


def test_the_seed_decides():
    x = torch.randn(100, requires_grad=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        memory = compress_activations(stochastic(pointwise=2))
        found.append(torch.stack([gradient(F.gelu, x, memory) for _ in range(2)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])  # each step draws anew


def test_a_recomputed_block_draws_in_its_recomputation_alone():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    x = torch.randn(8, 4, 16, requires_grad=True)
    memory = compress_activations(stochastic(pointwise=2, recompute="block"), [block])
    with memory:
        out = block(x)
        before = memory.calibration.state_dict()["draws"]
    out.sum().backward()
    with memory:
        block(x)
    after = memory.calibration.state_dict()["draws"]
    assert after[1] - before[1] == 1
