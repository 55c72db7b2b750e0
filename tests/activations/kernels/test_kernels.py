"""Triton kernels against the plain operators: on a CUDA device, or under Triton's interpreter in a process of its
own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations.quant import codebooks, packing
from s2a_cli.activations.quant.primitives import ACTIVATIONS, PLAIN, with_inverse

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if INTERPRETED or DEVICE == "cuda":
    from s2a_cli.activations.kernels import launch

here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_under_the_interpreter")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in TYPES}
SHAPES = ((1,), (7,), (1024,), (3, 1000), (2, 5, 517))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the other tests are run as they are")
def test_under_the_interpreter():
    files = sorted(str(file) for file in Path(__file__).parent.glob("test_kernels*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DEVICE, dtype)


def channelled(width: int) -> torch.Tensor:
    """A shift, a factor and its inverse for each channel."""
    return with_inverse(torch.stack([normal(width), normal(width).abs() + 0.5]))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if INTERPRETED and found.dtype == torch.bfloat16:  # to which the interpreter rounds towards 0
        return torch.allclose(found.float(), expected.float(), rtol=2.0**-7, atol=0, equal_nan=True)
    return torch.equal(found, expected)


def table_of(bits: int, low: float, high: float = 1.0, bins: int = codebooks.GROUP_BINS) -> codebooks.Codebook:
    """Evenly spaced levels: what kernels do does not depend on them."""
    packing = torch.arange(bins) * 2**bits // bins
    return codebooks.Codebook(bits, low, high, packing.to(torch.uint8), torch.linspace(low, high, 2**bits)).to(DEVICE)


def bent(bits: int) -> codebooks.Codebook:
    """One where bins far from each other share a code, as for GELU'."""
    table = table_of(bits, -codebooks.RANGE, codebooks.RANGE, codebooks.POINTWISE_BINS)
    return replace(table, bin_codes=(table.bin_codes ^ (table.bin_codes.flip(0) << 1)) & (2**bits - 1))


@here
@pytest.mark.parametrize("bits", range(1, 9))
def test_pointwise_codes_and_products_are_the_same_bits(bits):
    for shape, dtype in itertools.product(SHAPES, TYPES):
        x, grad = normal(*shape, dtype=dtype, scale=3), normal(*shape, dtype=dtype)
        x.view(-1)[-1] = torch.inf
        table = bent(bits)
        arguments = x, table.bin_codes, table.low, table.high, bits
        packed = PLAIN["quantize_elementwise"](*arguments)
        assert same(launch.quantize_elementwise(*arguments), packed)
        arguments = grad, packed, table.entries, bits
        assert same(launch.multiply_dequantized(*arguments), PLAIN["multiply_dequantized"](*arguments))


@here
def test_strided_inputs_are_read_in_logical_order():
    x = normal(40, 30).t()
    table = bent(4)
    arguments = x, table.bin_codes, table.low, table.high, 4
    packing = PLAIN["quantize_elementwise"](*arguments)
    assert same(launch.quantize_elementwise(*arguments), packing)
    arguments = x, packing, table.entries, 4
    assert same(launch.multiply_dequantized(*arguments), PLAIN["multiply_dequantized"](*arguments))
    arguments = x, "silu", table.bin_codes, table.low, table.high, 4
    y, found = launch.activate(*arguments)
    assert y.stride() == x.stride() and same(
        found, PLAIN["quantize_elementwise"](x.t(), *arguments[2:])
    )  # as x lies in memory
    torch.testing.assert_close(y, F.silu(x))


@here
@pytest.mark.parametrize("low, high", [(0.0, torch.inf), (-1.0, 1.0), (0.1, 0.3)])
def test_intervals_are_the_same_bits(low, high):
    for shape, dtype in itertools.product(SHAPES, TYPES):
        x = normal(*shape, dtype=dtype)
        x.view(-1)[:4] = torch.tensor([low, high, torch.nan, torch.inf])[: x.numel()]
        assert same(launch.pack_interval(x, low, high), PLAIN["pack_interval"](x, low, high))


@here
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_are_stock_to_rounding(function):
    for shape, dtype in itertools.product(SHAPES, TYPES):
        x = normal(*shape, dtype=dtype, scale=4)
        x.view(-1)[-1] = 1e4
        table = bent(4)
        arguments = x, function, table.bin_codes, table.low, table.high, 4
        (y, packing), (stock, expected) = launch.activate(*arguments), PLAIN["activate"](*arguments)
        assert y.dtype == dtype and same(packing, expected)
        # 1 + erf(x) and 1 + tanh(x) cancel where x is far below 0: a float32 rounding of 1, times x
        torch.testing.assert_close(y.float(), stock.float(), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@here
def test_what_kernels_do_not_cover_is_plain():
    x = normal(50).double()
    table = codebooks.pointwise(F.gelu, {}, 4, x, stochastic=True)
    for values, seed in ((x, 0), (x.float(), 5), (x[:0].float(), 0)):
        arguments = values, table.bin_codes, table.low, table.high, 4, table.chances, seed
        assert same(launch.quantize_elementwise(*arguments), PLAIN["quantize_elementwise"](*arguments))
    assert same(launch.pack_interval(x, 0.0, 1.0), PLAIN["pack_interval"](x, 0.0, 1.0))


WIDTHS = [(64, 64), (8, 32), (64, 32), (40, 16), (104, 128), (264, 64)]  # and the group
UNCOVERED = [(49, 64), (197, 64), (1, 64), (72, 48)]


def unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    return packing.unpack(packed, 0, count, bits, count).int()


@here
@pytest.mark.parametrize("width, group", WIDTHS + UNCOVERED)
@pytest.mark.parametrize("calibrated", [False, True])
def test_groups_are_the_same_bits(width, group, calibrated):
    channels = channelled(width) if calibrated else None
    for rows, bits, dtype in zip((1, 5, 33, 8, 9, 3, 7, 11), range(1, 9), itertools.cycle(TYPES)):
        x = normal(rows, width, dtype=dtype)
        x[0, :8] = 0
        x[-1, -1] = 100  # the last group may be short
        table = table_of(bits, 0.0 if bits == 3 and not calibrated else -1.0)
        x = x.abs() if table.low == 0 else x
        arguments = x, table.bin_codes, table.low, group, bits, None, 0, channels
        (found, found_scales), (expected, scales) = (
            launch.quantize_groupwise(*arguments),
            PLAIN["quantize_groupwise"](*arguments),
        )
        assert same(found_scales, scales) and torch.equal(found_scales, scales)
        assert same(found, expected)
        for start, stop in ((0, rows), (rows // 2, rows)):
            arguments = found, scales, table.entries, width, group, bits, start, stop, dtype, channels
            values, plain = launch.dequantize_groupwise(*arguments), PLAIN["dequantize_groupwise"](*arguments)
            assert values.dtype == dtype and values.shape == plain.shape
            if calibrated:  # a sum, whose product may be rounded or not
                torch.testing.assert_close(values.float(), plain.float(), rtol=2 * EPS[dtype], atol=1e-5)
            else:
                assert same(values, plain)


@here
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e38, torch.inf])
def test_groups_of_extreme_values(value):
    x = torch.full((4, 64), value, device=DEVICE)
    table = table_of(4, -1.0)
    arguments = x, table.bin_codes, table.low, 64, 4
    (found, found_scales), (expected, scales) = (
        launch.quantize_groupwise(*arguments),
        PLAIN["quantize_groupwise"](*arguments),
    )
    if not INTERPRETED or value != 1e-40:  # a denormal, which the interpreter rounds to 0
        assert torch.equal(found_scales, scales)
    if value != torch.inf:
        assert same(found, expected)


@here
@pytest.mark.parametrize("width, group", WIDTHS + UNCOVERED)
@pytest.mark.parametrize("centre, calibrated", [(True, True), (True, False), (False, True), (False, False)])
def test_norms(width, group, centre, calibrated):
    channels = channelled(width) if calibrated else None
    for rows, bits, dtype in zip((1, 33, 8), (4, 3, 8), itertools.cycle(TYPES)):
        x = normal(rows, width, dtype=dtype) + 0.5
        table = table_of(bits, -1.0)
        arguments = x, width, 1e-5, centre, table.bin_codes, group, bits, None, 0, channels
        found, plain = launch.quantize_normalized(*arguments), PLAIN["quantize_normalized"](*arguments)
        torch.testing.assert_close(found[2], plain[2], rtol=1e-5, atol=0)
        # x^ differs in its last bits: so may a scale, and a code of a value at the border of two bins
        torch.testing.assert_close(found[1].float(), plain[1].float(), rtol=2.0**-7, atol=1e-6)
        differ = (unpacked(found[0], bits, x.numel()) - unpacked(plain[0], bits, x.numel())).abs()
        assert differ.max() <= 1 and (differ > 0).sum() <= 2 + 0.01 * x.numel()

        grad, weight = normal(rows, width, dtype=dtype).flip(0), normal(width)
        for scale in (weight, None):
            arguments = grad, *plain, table.entries, scale, width, width, width, centre, group, bits, channels
            for name, mine, stock in zip(
                ("x", "weight", "bias"), launch.norm_backward(*arguments), PLAIN["norm_backward"](*arguments)
            ):
                assert mine.dtype == stock.dtype and mine.shape == stock.shape
                size = stock.float().abs().amax() + 1e-3
                error = (mine.float() - stock.float()).abs().amax()
                assert error <= 4 * EPS[dtype] * size + 1e-5, (name, rows, bits, dtype)


@here
def test_a_backward_pass_of_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    monkeypatch.setattr(launch, "TILE", 128)
    x, weight = normal(37, 64), normal(64)
    table = table_of(4, -1.0)
    kept = PLAIN["quantize_normalized"](x, 64, 1e-5, True, table.bin_codes, 64, 4)
    arguments = x.flip(0), *kept, table.entries, weight, 64, 64, 64, True, 64, 4
    for mine, stock in zip(launch.norm_backward(*arguments), PLAIN["norm_backward"](*arguments)):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-4)


@here
def test_group_norm_is_plain():
    x = normal(4, 6, 16)
    table = table_of(4, -1.0)
    kept = PLAIN["quantize_normalized"](x, 48, 1e-5, True, table.bin_codes, 64, 4)
    arguments = x, *kept, table.entries, normal(6), 48, 3, 6, True, 64, 4
    for mine, stock in zip(launch.norm_backward(*arguments), PLAIN["norm_backward"](*arguments)):
        assert same(mine, stock)
