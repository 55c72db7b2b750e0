"""Packing, tables of levels, and the bytes they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s2a_cli.activations.quant import codebooks, packing
from s2a_cli.activations.quant.primitives import (
    dequantize_groupwise,
    multiply_dequantized,
    pack_interval,
    quantize_elementwise,
    quantize_groupwise,
)

BITS = range(1, 9)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), count=st.integers(0, 200), cut=st.integers(0, 200), seed=st.integers(0, 999))
def test_packing_round_trips_and_wastes_less_than_a_byte_a_plane(bits, count, cut, seed):
    values = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = torch.zeros(packing.packed_size(count, bits), dtype=torch.uint8)
    cut = min(cut, count) // 8 * 8
    packing.pack_into(packed, 0, values[:cut].clone(), bits, count)
    packing.pack_into(packed, cut, values[cut:].clone(), bits, count)
    assert torch.equal(packing.unpack(packed, 0, count, bits, count), values)
    table = packing.byte_table(torch.arange(2.0**bits), bits)
    assert torch.equal(packing.lookup(packed, cut, count, table, bits, count), values[cut:].float())
    assert 8 * packed.numel() - bits * count < 8 * len(packing.PLANES[bits])


def test_a_few_bits_a_byte():
    packed = torch.zeros(2, dtype=torch.uint8)
    packing.pack_into(packed, 0, torch.tensor([1, 2, 3], dtype=torch.uint8), 4, 3)
    assert packed.tolist() == [0x21, 0x03]


@pytest.mark.parametrize("shape", [(3, 5), (8, 40), (16, 7), (1, 9), (2, 3, 4, 5)])
def test_pieces_cover_a_strided_tensor_in_logical_order(shape, set_chunk_sizes):
    set_chunk_sizes(temporary=32)
    whole = torch.arange(2 * torch.Size(shape).numel()).view(*shape[:-1], -1)
    for x in (whole[..., : shape[-1]], whole[..., : shape[-1]].contiguous(), whole[..., : shape[-1]].transpose(0, -1)):
        pieces = list(packing.elements(x))
        assert torch.equal(torch.cat([piece for _, piece in pieces]), x.flatten())
        assert all(start % 8 == 0 for start, _ in pieces)
        assert sum(piece.numel() for _, piece in pieces) == x.numel()


# Root mean square error of GELU' over N(0, 1) and N(0, 2^2): the optimum of piecewise-constant derivatives.
@pytest.mark.parametrize(
    "bits, std, bound", [(2, 1, 0.090), (3, 1, 0.044), (4, 1, 0.024), (2, 2, 0.073), (3, 2, 0.045), (4, 2, 0.022)]
)
def test_levels_reach_the_optimum_of_a_known_distribution(bits, std, bound):
    table = codebooks.derivative_codebook(F.gelu, bits, lambda x: torch.exp(-((x / std) ** 2) / 2))
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    weight = torch.exp(-((x / std) ** 2) / 2)
    error = multiply_dequantized(torch.ones_like(x), *_coded(x, table)) - _derivative(F.gelu, x)
    assert ((weight * error**2).sum() / weight.sum()).sqrt() < bound
    assert abs((weight * error).sum() / weight.sum()) < 1e-4  # cell means: no bias


def test_levels_are_a_minimum():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(2, 60, dtype=torch.float64, generator=generator)
    best = codebooks.optimal_entries(values, weights, 2)
    chosen = codebooks.nearest(values, best)
    error = (weights * (best[chosen.long()] - values) ** 2).sum()
    order = values.argsort()
    for _ in range(300):  # no other cut into four runs is better
        cuts = torch.randperm(59, generator=generator)[:3].sort().values + 1
        runs = torch.tensor_split(order, cuts)
        other = sum(
            (weights[r] * (values[r] - (weights[r] * values[r]).sum() / weights[r].sum()) ** 2).sum() for r in runs
        )
        assert error <= other + 1e-12


@pytest.mark.parametrize(
    "function", [F.gelu, F.silu, F.mish, F.hardswish, torch.sigmoid, torch.tanh, F.elu, F.softplus]
)
def test_the_error_of_every_table_falls_with_bits(function):
    x = torch.linspace(-7, 5, 5001, dtype=torch.float64)
    errors = []
    for bits in (2, 4, 8):
        table = codebooks.pointwise(function, {}, bits, x)
        errors.append(
            (multiply_dequantized(torch.ones_like(x), *_coded(x, table)) - _derivative(function, x))
            .square()
            .mean()
            .sqrt()
        )
    assert errors[0] > 3 * errors[1] > 20 * errors[2]
    assert errors[2] < 0.003


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "rows, width, group", [(5, 64, 64), (3, 100, 32), (9, 7, 64), (1, 1, 64), (16, 48, 16), (0, 8, 4)]
)
def test_groups_round_trip_within_the_grid(bits, rows, width, group):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    table = codebooks.signed(bits, min(group, width), x)
    packed, scales = quantize_groupwise(x, table.bin_codes, table.low, group, bits)
    back = dequantize_groupwise(packed, scales, table.entries, width, group, bits, 0, rows, x.dtype)
    assert packed.numel() + 2 * scales.numel() == packing.groupwise_size(rows, width, group, bits)
    centres = torch.linspace(-1, 1, table.bin_codes.numel())
    cell = (table.entries[table.bin_codes.int()] - centres).abs().max()  # the farthest a value is from its level
    largest = torch.stack([part.abs().amax(-1) for part in x.split(group, -1)], -1).repeat_interleave(group, -1)[
        :, :width
    ]
    assert ((back - x).abs() <= largest * (cell + 0.005)).all()
    middle = dequantize_groupwise(packed, scales, table.entries, width, group, bits, rows // 2, rows, x.dtype)
    assert torch.equal(middle, back[rows // 2 :])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outlier", [100.0, -100.0])
def test_an_outlier_is_kept_and_its_group_does_not_grow(bits, outlier):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = outlier
    table = codebooks.signed(bits, 64, x)
    back = dequantize_groupwise(
        *quantize_groupwise(x, table.bin_codes, table.low, 64, bits), table.entries, 64, 64, bits, 0, 4, x.dtype
    )
    assert torch.allclose(back[:, 7], x[:, 7], rtol=0.005)
    assert back.square().sum() < 1.02 * x.square().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e-7])
def test_group_scales_survive_extremes(dtype, value):
    x = torch.full((2, 64), value, dtype=dtype)
    x[1, 0] = 1.0
    table = codebooks.signed(8, 64, x)
    back = dequantize_groupwise(
        *quantize_groupwise(x, table.bin_codes, table.low, 64, 8), table.entries, 64, 64, 8, 0, 2, dtype
    )
    assert back.isfinite().all()
    assert torch.allclose(back[0].float(), x[0].float(), rtol=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_activation_is_no_error(bad):
    x = torch.full((64,), bad)
    table = codebooks.pointwise(F.gelu, {}, 4, x)
    quantize_elementwise(x, table.bin_codes, table.low, table.high, 4)
    quantize_groupwise(x, codebooks.signed(4, 64, x).bin_codes, -1.0, 64, 4)


def test_interval_is_open():
    x = torch.tensor([-3.0, -2.9, 0.0, 2.9, 3.0])
    packed = pack_interval(x, -3.0, 3.0)
    assert packing.unpack(packed, 0, 5, 1, 5).tolist() == [0, 1, 1, 1, 0]


def _coded(x, table):
    return quantize_elementwise(x, table.bin_codes, table.low, table.high, table.bits), table.entries, table.bits


def _derivative(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]
