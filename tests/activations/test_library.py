"""The custom operators as PyTorch's own checks see them: schemas, fake implementations, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations.ops.attention import softmax_backward
from s2a_cli.activations.ops.linear_conv import weight_gradient
from s2a_cli.activations.ops.norm import norm_backward, quantize_normalized
from s2a_cli.activations.ops.pooling import max_pool2d, max_pool2d_backward
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.primitives import (
    activate,
    dequantize_groupwise,
    dequantize_int8,
    multiply_dequantized,
    pack_interval,
    quantize_elementwise,
    quantize_groupwise,
    with_inverse,
)

X = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
IMAGE = X.reshape(3, 3, 10, 10)
POOL = [3, 3], [2, 2], [1, 1], [1, 1], False
GELU, SIGNED = codebooks.pointwise(F.gelu, {}, 3, X), codebooks.signed(4, 64, X)
CODES, SCALES = quantize_groupwise(X, SIGNED.bin_codes, -1.0, 64, 4)
STOCHASTIC, CHANNELS = codebooks.signed(4, 64, X, True), with_inverse(torch.stack([X.mean(0), X.std(0)]))
NORM = quantize_normalized(X, 100, 1e-5, True, SIGNED.bin_codes, 64, 4)

CALLS = {
    "activate": (activate, (X, "gelu_tanh", GELU.bin_codes, GELU.low, GELU.high, 3)),
    "quantize_elementwise": (quantize_elementwise, (X, GELU.bin_codes, GELU.low, GELU.high, 3)),
    "pack_interval": (pack_interval, (X, 0.0, 6.0)),
    "multiply_dequantized": (multiply_dequantized, (X, pack_interval(X, 0.0, 6.0), torch.tensor([0.0, 1.0]), 1)),
    "quantize_groupwise": (quantize_groupwise, (X, SIGNED.bin_codes, -1.0, 64, 4)),
    "dequantize_groupwise": (dequantize_groupwise, (CODES, SCALES, SIGNED.entries, 100, 64, 4, 2, 7, torch.bfloat16)),
    "dequantize_int8": (
        dequantize_int8,
        (torch.arange(-99, 101).view(2, 100).to(torch.int8), SCALES[:2], torch.float16),
    ),
    "quantize_normalized": (quantize_normalized, (X, 100, 1e-5, True, SIGNED.bin_codes, 64, 4)),
    "norm_backward": (norm_backward, (X, *NORM, SIGNED.entries, X[0], 100, 100, 100, True, 64, 4)),
    "quantize_elementwise-stochastic": (
        quantize_elementwise,
        (X, GELU.bin_codes, GELU.low, GELU.high, 3, torch.zeros_like(GELU.bin_codes, dtype=torch.int16), 7),
    ),
    "quantize_groupwise-all": (
        quantize_groupwise,
        (X, STOCHASTIC.bin_codes, -1.0, 64, 4, STOCHASTIC.chances, 7, CHANNELS),
    ),
    "dequantize_groupwise-channels": (
        dequantize_groupwise,
        (CODES, SCALES, SIGNED.entries, 100, 64, 4, 2, 7, X.dtype, CHANNELS),
    ),
    "quantize_normalized-all": (
        quantize_normalized,
        (X, 100, 1e-5, False, STOCHASTIC.bin_codes, 64, 4, STOCHASTIC.chances, 7, CHANNELS),
    ),
    "norm_backward-channels": (norm_backward, (X, *NORM, SIGNED.entries, X[0], 100, 100, 100, True, 64, 4, CHANNELS)),
    "softmax_backward": (softmax_backward, (X, CODES, SCALES, SIGNED.entries, 64, 4)),
    "weight_gradient": (weight_gradient, (X[:, :7].clone(), CODES, SCALES, SIGNED.entries, 100, 64, 4)),
    "max_pool2d": (max_pool2d, (IMAGE, *POOL)),
    "max_pool2d_channels_last": (max_pool2d, (IMAGE.to(memory_format=torch.channels_last), *POOL)),
    "max_pool2d_backward": (max_pool2d_backward, (*max_pool2d(IMAGE, *POOL), [3, 3, 10, 10], *POOL)),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_implementation(name):
    operator, arguments = CALLS[name]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operators_are_single_nodes_of_a_compiled_graph():
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def round_trip(x):
        codes = quantize_elementwise(x, GELU.bin_codes, GELU.low, GELU.high, 3)
        return multiply_dequantized(x, codes, GELU.entries, 3)

    found = torch.compile(round_trip, backend=backend, fullgraph=True)(X)
    assert torch.equal(found, round_trip(X))
    assert quantize_elementwise in targets and multiply_dequantized in targets
