"""The custom operators as PyTorch's own checks see them: schemas, fake implementations, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s2a_cli.activations.ops.attention import softmax_backward
from s2a_cli.activations.ops.linear_conv import weight_gradient
from s2a_cli.activations.ops.norm import encode_norm, norm_backward
from s2a_cli.activations.ops.pooling import max_pool2d, max_pool2d_backward
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.primitives import (
    activate,
    decode_groups,
    decode_int8,
    encode_groups,
    encode_interval,
    encode_levels,
    multiply_levels,
    with_inverse,
)

X = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
IMAGE = X.reshape(3, 3, 10, 10)
POOL = [3, 3], [2, 2], [1, 1], [1, 1], False
GELU, SIGNED = codebooks.pointwise(F.gelu, {}, 3, X), codebooks.signed(4, 64, X)
CODES, SCALES = encode_groups(X, SIGNED.bins, -1.0, 64, 4)
STOCHASTIC, CHANNELS = codebooks.signed(4, 64, X, True), with_inverse(torch.stack([X.mean(0), X.std(0)]))
NORM = encode_norm(X, 100, 1e-5, True, SIGNED.bins, 64, 4)

CALLS = {
    "activate": (activate, (X, "gelu_tanh", GELU.bins, GELU.low, GELU.high, 3)),
    "encode_levels": (encode_levels, (X, GELU.bins, GELU.low, GELU.high, 3)),
    "encode_interval": (encode_interval, (X, 0.0, 6.0)),
    "multiply_levels": (multiply_levels, (X, encode_interval(X, 0.0, 6.0), torch.tensor([0.0, 1.0]), 1)),
    "encode_groups": (encode_groups, (X, SIGNED.bins, -1.0, 64, 4)),
    "decode_groups": (decode_groups, (CODES, SCALES, SIGNED.levels, 100, 64, 4, 2, 7, torch.bfloat16)),
    "decode_int8": (decode_int8, (torch.arange(-99, 101).view(2, 100).to(torch.int8), SCALES[:2], torch.float16)),
    "encode_norm": (encode_norm, (X, 100, 1e-5, True, SIGNED.bins, 64, 4)),
    "norm_backward": (norm_backward, (X, *NORM, SIGNED.levels, X[0], 100, 100, 100, True, 64, 4)),
    "encode_levels-stochastic": (
        encode_levels,
        (X, GELU.bins, GELU.low, GELU.high, 3, torch.zeros_like(GELU.bins, dtype=torch.int16), 7),
    ),
    "encode_groups-all": (encode_groups, (X, STOCHASTIC.bins, -1.0, 64, 4, STOCHASTIC.chances, 7, CHANNELS)),
    "decode_groups-channels": (decode_groups, (CODES, SCALES, SIGNED.levels, 100, 64, 4, 2, 7, X.dtype, CHANNELS)),
    "encode_norm-all": (
        encode_norm,
        (X, 100, 1e-5, False, STOCHASTIC.bins, 64, 4, STOCHASTIC.chances, 7, CHANNELS),
    ),
    "norm_backward-channels": (norm_backward, (X, *NORM, SIGNED.levels, X[0], 100, 100, 100, True, 64, 4, CHANNELS)),
    "softmax_backward": (softmax_backward, (X, CODES, SCALES, SIGNED.levels, 64, 4)),
    "weight_gradient": (weight_gradient, (X[:, :7].clone(), CODES, SCALES, SIGNED.levels, 100, 64, 4)),
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
        codes = encode_levels(x, GELU.bins, GELU.low, GELU.high, 3)
        return multiply_levels(x, codes, GELU.levels, 3)

    found = torch.compile(round_trip, backend=backend, fullgraph=True)(X)
    assert torch.equal(found, round_trip(X))
    assert encode_levels in targets and multiply_levels in targets
