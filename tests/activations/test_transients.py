"""What the codes need meanwhile: never as much as the tensor that they stand for."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from s2a_cli.activations import compress_activations
from s2a_cli.activations.ops.norm import quantize_normalized
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.primitives import (
    dequantize_groupwise,
    multiply_dequantized,
    pack_interval,
    quantize_elementwise,
    quantize_groupwise,
    with_inverse,
)
from s2a_cli.config.schema import QuantConfig

X = torch.randn(4096, 1536, generator=torch.Generator().manual_seed(0))  # 24 chunks
BYTES = X.numel() * X.element_size()


def peak(run) -> int:
    """Bytes allocated at once, within an operator too, beyond what there was; results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()  # noqa: F841  alive until the count is done
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_the_count_sees_what_operators_allocate():
    assert peak(lambda: X * 2 + 1) == pytest.approx(2 * BYTES, rel=0.001)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_encoding(bits, stochastic):
    gelu, signed = codebooks.pointwise(F.gelu, {}, bits, X, stochastic), codebooks.signed(bits, 64, X, stochastic)
    channels = with_inverse(torch.stack([X.mean(0), X.std(0)]))
    assert (
        peak(lambda: quantize_elementwise(X, gelu.bin_codes, gelu.low, gelu.high, bits, gelu.chances, 1)) < 0.6 * BYTES
    )
    for calibrated in (None, channels):
        grouped = (signed.bin_codes, -1.0, 64, bits, signed.chances, 1, calibrated)
        normal = (1536, 1e-5, True, signed.bin_codes, 64, bits, signed.chances, 1, calibrated)
        assert peak(functools.partial(quantize_groupwise, X, *grouped)) < 0.7 * BYTES
        assert peak(functools.partial(quantize_normalized, X, *normal)) < 0.7 * BYTES
    assert peak(lambda: pack_interval(X, 0.0, 6.0)) < 0.3 * BYTES


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_decoding_needs_little_beyond_its_result(bits):
    gelu, signed = codebooks.pointwise(F.gelu, {}, bits, X), codebooks.signed(bits, 64, X)
    codes = quantize_elementwise(X, gelu.bin_codes, gelu.low, gelu.high, bits)
    assert peak(lambda: multiply_dequantized(X, codes, gelu.entries, bits)) < 1.3 * BYTES
    kept = quantize_groupwise(X, signed.bin_codes, -1.0, 64, bits)
    assert peak(lambda: dequantize_groupwise(*kept, signed.entries, 1536, 64, bits, 0, len(X), X.dtype)) < 1.3 * BYTES


def test_calibration_looks_at_a_sample():
    memory = compress_activations(QuantConfig(name="test", pointwise=4, norm=4))
    codes, x = BYTES // 8, X.clone().requires_grad_()

    def run():
        with memory:
            return F.gelu(F.layer_norm(x, (1536,)))

    assert peak(run) < 2 * BYTES + 2 * codes + 0.7 * BYTES  # two results, two codes, chunks


def test_an_unfused_map_never_exists_whole(set_chunk_sizes):
    set_chunk_sizes(decoded=1 << 18)
    q = torch.randn(64, 2, 256, 8, requires_grad=True)
    whole = 64 * 2 * 256 * 256 * 4

    def run():
        with compress_activations(QuantConfig(name="test", softmax=4)):
            out = F.scaled_dot_product_attention(q, q, q)
        return torch.autograd.grad(out.sum(), q)

    assert peak(run) < 0.6 * whole
