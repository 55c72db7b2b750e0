"""Tables of levels of derivatives, against uniform grids and published figures."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations.quant import codebooks

GRID = torch.linspace(-codebooks.RANGE, codebooks.RANGE, 100_001, dtype=torch.float64)


def normal(mean: float, deviation: float):
    return lambda x: torch.exp(-(((x - mean) / deviation) ** 2) / 2)


def derivative(function) -> torch.Tensor:
    x = GRID.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def error(function, table: codebooks.Codebook, density) -> float:
    """Root mean square over inputs of this density."""
    index = (
        ((GRID - table.low) / (table.high - table.low) * len(table.bin_codes)).long().clamp(0, len(table.bin_codes) - 1)
    )
    wrong = table.entries.double()[table.bin_codes[index].long()] - derivative(function)
    return float((density(GRID) * wrong**2).sum().div(density(GRID).sum()).sqrt())


# Root mean square errors of GELU' over N(0,1) and N(0, 2^2). Columns: min-max grid on the input, uniform grid on f',
# codebook of Few-Bit Backward (arXiv 2202.00441), and the optimum.
PUBLISHED = {
    (2, 1): (0.295, 0.105, 0.095, 0.090),
    (2, 2): (0.166, 0.098, 0.085, 0.073),
    (3, 1): (0.193, 0.048, 0.058, 0.044),
    (3, 2): (0.209, 0.051, 0.046, 0.045),
    (4, 1): (0.094, 0.023, 0.031, 0.024),
    (4, 2): (0.126, 0.025, 0.026, 0.022),
}


@pytest.mark.parametrize("bits, deviation", PUBLISHED)
def test_the_table_of_errors_of_gelu(bits, deviation):
    density, columns = normal(0, deviation), PUBLISHED[bits, deviation]
    uniform = codebooks.derivative_codebook(F.gelu, bits, entries=codebooks.uniform_entries(F.gelu, bits))
    assert error(F.gelu, uniform, density) == pytest.approx(columns[1], abs=0.0011)
    ours = error(F.gelu, codebooks.derivative_codebook(F.gelu, bits, density), density)
    assert ours <= min(columns) + 0.0005  # they are rounded to three digits


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu-tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_uniform_grid_is_better(name):
    function = FUNCTIONS[name]
    last = float("inf")
    for bits in range(1, 9):
        uniform = codebooks.derivative_codebook(function, bits, entries=codebooks.uniform_entries(function, bits))
        for density in (normal(0, 1), normal(0, 2), codebooks.pointwise_weights):
            ours = error(function, codebooks.derivative_codebook(function, bits, density), density)
            assert ours <= error(function, uniform, density)
        assert ours < 0.7 * last
        last = ours


def test_tables_are_made_once():
    like = torch.zeros(())
    assert codebooks.pointwise(F.gelu, {}, 4, like) is codebooks.pointwise(F.gelu, {}, 4, like)
    assert codebooks.signed(4, 64, like, True) is codebooks.signed(4, 64, like, True)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_table_is_derived_from_its_levels(stochastic):
    made = codebooks.derivative_codebook(F.silu, 4, stochastic=stochastic)
    again = codebooks.derivative_codebook(F.silu, 4, stochastic=stochastic, entries=made.entries)
    assert torch.equal(made.entries, again.entries)
    assert (made.bin_codes != again.bin_codes).float().mean() < 1e-3  # ties at float32's rounding


def test_a_jump_of_softplus_at_its_threshold_is_no_slope():
    softplus = functools.partial(F.softplus, beta=3, threshold=1)
    table = codebooks.derivative_codebook(softplus, 4, normal(0, 1))
    assert table.entries.min() >= -0.01 and table.entries.max() <= 1.01
