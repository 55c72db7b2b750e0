"""Kernels of rows that lie anywhere and have any width against their plain twins; run as test_kernels.py says."""

from __future__ import annotations

import pytest
import torch
from test_kernels import DEVICE, EPS, INTERPRETED, TYPES, channelled, here, normal, same, table_of

from s2a_cli.activations.quant.primitives import PLAIN

if INTERPRETED or DEVICE == "cuda":
    from s2a_cli.activations.kernels import launch


def heads(samples: int, tokens: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """q, k and v [3, B, heads, N, d] as one layer makes them: views of [B, N, 3, heads, d]."""
    return normal(samples, tokens, 3, count, width, dtype=dtype).permute(2, 0, 3, 1, 4)


@here
@pytest.mark.parametrize("dtype, width", list(zip(TYPES, (32, 64, 80))))
def test_views_are_coded_where_they_lie(monkeypatch, dtype, width):
    """No copy is made of q, k and v, of a slice, or of what is laid out anew."""
    table, read = table_of(4, -1.0), []
    inner = launch.grouped.encode

    class Watched:
        def __getitem__(self, grid):
            return lambda x, *args, **kwargs: (read.append(x.data_ptr()), inner[grid](x, *args, **kwargs))

    monkeypatch.setattr(launch.grouped, "encode", Watched())
    q, k, v = heads(2, 5, 3, width, dtype)
    for x in (q, k[:, :2], v[1:], q.transpose(1, 2), q[:, :, 2], k[:, 1:, ::2]):
        arguments = x, table.bin_codes, -1.0, 64, 4
        (found, found_scales), (expected, scales) = (
            launch.quantize_groupwise(*arguments),
            PLAIN["quantize_groupwise"](*arguments),
        )
        assert same(found_scales, scales) and same(found, expected)
        assert read.pop() == x.data_ptr()
        channels = channelled(width)
        arguments = x, width, 1e-5, True, table.bin_codes, 64, 4, None, 0, channels
        found, expected = launch.quantize_normalized(*arguments), PLAIN["quantize_normalized"](*arguments)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=0)
        assert read.pop() == x.data_ptr()


@here
def test_rows_of_other_tensors_are_copied():
    table = table_of(4, -1.0)
    for x in (
        normal(4, 3, 64, 5).mT,
        normal(64, 9, 2)[..., 0].t(),
        normal(2, 3, 2, 3, 2, 3, 64)[:, 0:2, :, 0:2, :, 0:2],
    ):
        arguments = x, table.bin_codes, -1.0, 64, 4
        (found, found_scales), (expected, scales) = (
            launch.quantize_groupwise(*arguments),
            PLAIN["quantize_groupwise"](*arguments),
        )
        assert same(found_scales, scales) and same(found, expected)


@here
def test_reciprocals_of_scales_are_rounded_correctly():
    """Of all that bfloat16 holds: what a program divides by is exactly what its twin divides by."""
    scales = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).float()
    scales = scales[scales.isfinite() & (scales > 2.0**-100)].view(-1, 1)
    x = torch.cat([scales, (scales * torch.rand(len(scales), 7, generator=torch.Generator().manual_seed(0)))], 1).to(
        DEVICE
    )
    table = table_of(8, -1.0)
    (found, found_scales), (expected, stored) = (
        f(x, table.bin_codes, -1.0, 8, 8) for f in (launch.quantize_groupwise, PLAIN["quantize_groupwise"])
    )
    assert torch.equal(found_scales, stored) and torch.equal(found, expected)


@here
@pytest.mark.parametrize("width, group", [(197, 64), (49, 64), (196, 64), (64, 64), (5, 64), (257, 32), (1, 64)])
def test_softmax_maps(width, group):
    for rows, bits, dtype in zip((1, 8, 21, 40), (4, 3, 8, 5), (*TYPES, torch.bfloat16)):
        p = torch.softmax(normal(rows, width, scale=3), -1).to(dtype)
        p[-1] = torch.zeros(width)
        p[-1, -1] = 1
        table = table_of(bits, 0.0)
        arguments = p, table.bin_codes, 0.0, group, bits
        (found, found_scales), (codes, scales) = (
            launch.quantize_groupwise(*arguments),
            PLAIN["quantize_groupwise"](*arguments),
        )
        assert same(found_scales, scales) and same(found, codes)
        for start, stop in ((0, rows), (rows // 3, rows)):
            arguments = codes, scales, table.entries, width, group, bits, start, stop, dtype
            assert same(launch.dequantize_groupwise(*arguments), PLAIN["dequantize_groupwise"](*arguments))
        grad = normal(rows, width, dtype=dtype)
        arguments = grad, codes, scales, table.entries, group, bits
        mine, stock = launch.softmax_backward(*arguments), PLAIN["softmax_backward"](*arguments)
        assert mine.dtype == dtype and mine.shape == stock.shape
        torch.testing.assert_close(mine.float(), stock.float(), rtol=4 * EPS[dtype], atol=2 * EPS[dtype] + 2e-6)


@here
@pytest.mark.parametrize("bits", range(1, 9))
def test_maps_of_no_multiple_of_a_byte(bits):
    """Rows that share bytes, in one plane and in several."""
    table = table_of(bits, 0.0)
    for rows, width in ((3, 3), (9, 13), (17, 49)):
        p = normal(rows, width).abs()
        arguments = p, table.bin_codes, 0.0, 16, bits
        (found, found_scales), (codes, scales) = (
            launch.quantize_groupwise(*arguments),
            PLAIN["quantize_groupwise"](*arguments),
        )
        assert same(found_scales, scales) and same(found, codes)
        arguments = codes, scales, table.entries, width, 16, bits, 1, rows, torch.float32
        assert same(launch.dequantize_groupwise(*arguments), PLAIN["dequantize_groupwise"](*arguments))


@here
@pytest.mark.parametrize("dtype, width, calibrated", list(zip(TYPES, (64, 64, 27), (True, False, False))))
def test_weight_gradients(set_chunk_sizes, dtype, width, calibrated):
    set_chunk_sizes(temporary=512)  # several pieces
    table, channels = table_of(4, -1.0), channelled(width) if calibrated else None
    x, grad = normal(3, 11, width, dtype=dtype), normal(3, 11, 7, dtype=dtype)
    codes, scales = PLAIN["quantize_groupwise"](x, table.bin_codes, -1.0, 64, 4, None, 0, channels)
    arguments = grad, codes, scales, table.entries, width, 64, 4, channels
    mine, stock = launch.weight_gradient(*arguments), PLAIN["weight_gradient"](*arguments)
    assert mine.dtype == stock.dtype and mine.shape == stock.shape == (7, width)
    torch.testing.assert_close(
        mine.float(), stock.float(), rtol=8 * EPS[dtype], atol=8 * EPS[dtype] * stock.abs().max().item()
    )


@here
@pytest.mark.parametrize("dtype, rows, width", list(zip(TYPES * 2, (5, 3, 7, 1, 2), (64, 27, 147, 1, 1100))))
def test_frozen_weights(dtype, rows, width):
    """int8 and NF4 as they are stored, decoded for a layer."""
    from s2a_cli.backbones import weight_quant

    weight = normal(rows, width, dtype=dtype)
    codes, scales = weight_quant.quantize_int8(weight)
    arguments = codes, scales.view(torch.bfloat16), dtype
    assert same(launch.dequantize_int8(*arguments), PLAIN["dequantize_int8"](*arguments))
    codes, scales = weight_quant.quantize_nf4(weight)
    table, scales = weight_quant.normal_float_codebook().to(DEVICE), scales.view(torch.bfloat16)
    arguments = codes, scales, table.entries, width, width // scales.shape[1], 4, 0, rows, dtype
    assert same(launch.dequantize_groupwise(*arguments), PLAIN["dequantize_groupwise"](*arguments))


@here
@pytest.mark.parametrize("dtype", TYPES)
def test_empty_batches(dtype):
    x, table = torch.empty(0, 3, 64, dtype=dtype, device=DEVICE), table_of(4, -1.0)
    codes, scales = launch.quantize_groupwise(x, table.bin_codes, -1.0, 64, 4)
    assert codes.shape == (0,) and scales.shape == (0, 1)
    assert launch.dequantize_groupwise(codes, scales, table.entries, 64, 64, 4, 0, 0, dtype).shape == (0, 64)
    assert launch.softmax_backward(x, codes, scales, table.entries, 64, 4).shape == x.shape
    kept = launch.quantize_normalized(x, 64, 1e-5, True, table.bin_codes, 64, 4)
    assert launch.norm_backward(x, *kept, table.entries, None, 64, 64, 64, True, 64, 4)[0].shape == x.shape
    assert launch.weight_gradient(x[..., :7], codes, scales, table.entries, 64, 64, 4).eq(0).all()
    assert (
        launch.quantize_elementwise(x, table.bin_codes, -1.0, 1.0, 4).shape
        == launch.pack_interval(x, 0.0, 1.0).shape
        == (0,)
    )
    assert launch.multiply_dequantized(x, codes, table.entries, 4).shape == x.shape
    out, packed = launch.max_pool2d(x.view(0, 3, 8, 8), [2, 2], [2, 2], [0, 0], [1, 1], False)
    assert out.shape == (0, 3, 4, 4) and packed.shape == (0,)
    dx = launch.max_pool2d_backward(out, packed, [0, 3, 8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False)
    assert dx.shape == (0, 3, 8, 8)


POOLS = [  # kernel, stride, padding, dilation, ceil_mode
    ([3, 3], [2, 2], [1, 1], [1, 1], False),
    ([2, 2], [2, 2], [0, 0], [1, 1], True),
    ([5, 3], [1, 2], [2, 1], [1, 2], False),
    ([3, 2], [3, 1], [1, 0], [2, 3], True),
    ([7, 7], [2, 2], [3, 3], [1, 1], False),  # plain: 49 places
]


@here
@pytest.mark.parametrize("pool, dtype", list(zip(POOLS, TYPES * 2)))
@pytest.mark.parametrize("last", [False, True])
def test_max_pooling(dtype, pool, last):
    x = normal(2, 3, 13, 17, dtype=dtype)
    x[0, 0, :4, :4] = 1.5  # several are the largest
    x[0, 1, 5, 5:7] = torch.nan
    x[1, 2, :8] = -torch.inf
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    (out, packed), (stock, expected) = launch.max_pool2d(x, *pool), PLAIN["max_pool2d"](x, *pool)
    assert out.stride() == stock.stride() and torch.equal(packed, expected)
    torch.testing.assert_close(out, stock, rtol=0, atol=0, equal_nan=True)
    grad = normal(*out.shape, dtype=dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    arguments = grad, packed, list(x.shape), *pool
    mine, stock = launch.max_pool2d_backward(*arguments), PLAIN["max_pool2d_backward"](*arguments)
    assert mine.stride() == stock.stride()
    torch.testing.assert_close(mine.float(), stock.float(), rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@here
def test_pooling_of_views():
    x = normal(2, 6, 12, 12)[:, ::2, 1:, 2:]
    (out, packed), (stock, expected) = (f(x, *POOLS[0]) for f in (launch.max_pool2d, PLAIN["max_pool2d"]))
    assert torch.equal(packed, expected) and torch.equal(out, stock)
