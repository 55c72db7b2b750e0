"""Triton kernels against the plain operators: on a CUDA device, or under Triton's interpreter in a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations import levels
from s2a_cli.activations.operators import ACTIVATIONS, PLAIN

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if INTERPRETED or DEVICE == "cuda":
    from s2a_cli.activations.kernels import launch

here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_under_the_interpreter")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (7,), (1024,), (3, 1000), (2, 5, 517))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the other tests are run as they are")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DEVICE, dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if INTERPRETED and found.dtype == torch.bfloat16:  # to which the interpreter rounds towards 0
        return torch.allclose(found.float(), expected.float(), rtol=2.0**-7, atol=0, equal_nan=True)
    return torch.equal(found, expected)


@here
@pytest.mark.parametrize("bits", range(1, 9))
def test_pointwise_codes_and_products_are_the_same_bits(bits):
    for (shape, dtype), function in zip(itertools.product(SHAPES, TYPES), itertools.cycle((F.gelu, F.silu))):
        x, grad = normal(*shape, dtype=dtype, scale=3), normal(*shape, dtype=dtype)
        x.view(-1)[-1] = torch.inf
        table = levels.pointwise(function, {}, bits, x)
        arguments = x, table.bins, table.low, table.high, bits
        codes = PLAIN["encode_levels"](*arguments)
        assert same(launch.encode_levels(*arguments), codes)
        arguments = grad, codes, table.levels, bits
        assert same(launch.multiply_levels(*arguments), PLAIN["multiply_levels"](*arguments))


@here
def test_strided_inputs_are_read_in_logical_order():
    x = normal(40, 30).t()
    table = levels.pointwise(F.gelu, {}, 4, x)
    arguments = x, table.bins, table.low, table.high, 4
    codes = PLAIN["encode_levels"](*arguments)
    assert same(launch.encode_levels(*arguments), codes)
    arguments = x, codes, table.levels, 4
    assert same(launch.multiply_levels(*arguments), PLAIN["multiply_levels"](*arguments))
    arguments = x, "silu", table.bins, table.low, table.high, 4
    y, found = launch.activate(*arguments)
    assert y.is_contiguous() and same(found, codes)
    torch.testing.assert_close(y, F.silu(x))


@here
@pytest.mark.parametrize("low, high", [(0.0, torch.inf), (-1.0, 1.0), (0.1, 0.3)])
def test_intervals_are_the_same_bits(low, high):
    for shape, dtype in itertools.product(SHAPES, TYPES):
        x = normal(*shape, dtype=dtype)
        x.view(-1)[:4] = torch.tensor([low, high, torch.nan, torch.inf])[: x.numel()]
        assert same(launch.encode_interval(x, low, high), PLAIN["encode_interval"](x, low, high))


@here
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_are_stock_to_rounding(function):
    for shape, dtype in itertools.product(SHAPES, TYPES):
        x = normal(*shape, dtype=dtype, scale=4)
        x.view(-1)[-1] = 1e4
        table = levels.pointwise(F.gelu, {}, 4, x)
        arguments = x, function, table.bins, table.low, table.high, 4
        (y, codes), (stock, expected) = launch.activate(*arguments), PLAIN["activate"](*arguments)
        assert y.dtype == dtype and same(codes, expected)
        # 1 + erf(x) and 1 + tanh(x) cancel where x is far below 0: a float32 rounding of 1, times x
        torch.testing.assert_close(y.float(), stock.float(), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@here
def test_what_kernels_do_not_cover_is_plain():
    x = normal(50).double()
    table = levels.pointwise(F.gelu, {}, 4, x, stochastic=True)
    for values, seed in ((x, 0), (x.float(), 5), (x[:0].float(), 0)):
        arguments = values, table.bins, table.low, table.high, 4, table.chances, seed
        assert same(launch.encode_levels(*arguments), PLAIN["encode_levels"](*arguments))
    assert same(launch.encode_interval(x, 0.0, 1.0), PLAIN["encode_interval"](x, 0.0, 1.0))
