"""Operators by family: what the memory of a step is listed by."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn

# The first that matches the operator's name. Backward operators are called as the forward ones, plus `_backward`.
FAMILIES = {
    "attention": r"_?scaled_dot_product.*|_flash_attention.*|_efficient_attention.*",
    "normalisation": r".*(layer|group|batch|instance|rms)_norm.*|normalize.*|s2a::.*norm.*",
    "softmax": r"_?(safe_)?softmax.*|s2a::softmax.*",
    "activation": r"(leaky_)?relu6?_?|"
    r"(gelu|silu|mish|elu|hardswish|hardsigmoid|hardtanh|sigmoid|tanh|softplus|threshold|log_sigmoid)(_backward)?_?"
    r"|leaky_relu.*|s2a::(activate|interval|encode_levels|pointwise|slopes|decode_levels|decode_apply).*",
    "convolution": r".*convolution.*|.*conv\d?d.*",
    "linear": r"(add|badd)?b?mm_?|linear.*|matmul.*|addmv.*|einsum|_addmm.*",
    "pooling": r".*pool.*",
    "loss": r"_?log_softmax.*|nll_loss.*|.*cross_entropy.*|mse_loss.*|binary_cross.*",
    "optimiser": r"_foreach.*|_fused.*|_amp_foreach.*",
    "codes": r"s2a::.*",
}
PRIORITY = tuple(FAMILIES)  # of several readers of a kept tensor, the one that is named
KEEPS_RESULT = re.compile(
    r"aten::(_?scaled_dot.*|_?softmax|relu_?|sigmoid_?|tanh_?|max_pool.*|_log_softmax|hardsigmoid)"
)
OTHER = "elementwise and copies"


@functools.cache
def family(operator: Any) -> str:
    """The family of an operator (torch.ops...default); of a text, itself."""
    if operator is None or isinstance(operator, str):
        return operator or OTHER
    name = operator._schema.name
    short = name.removeprefix("aten::")
    return next((known for known, pattern in FAMILIES.items() if re.fullmatch(pattern, short)), OTHER)


@functools.cache
def reads(operator: Any) -> str | None:
    """The family of an operator that may keep what it reads for its backward pass; None for others."""
    found = family(operator)
    return (
        found
        if found in ("attention", "normalisation", "softmax", "activation", "convolution", "linear", "pooling")
        else None
    )


@functools.cache
def keeps_result(operator: Any) -> bool:
    return (
        operator is not None and not isinstance(operator, str) and KEEPS_RESULT.match(operator._schema.name) is not None
    )


def of_module(module: nn.Module) -> str:
    """The family of a layer's weights."""
    name = type(module).__name__.lower()
    known = {"norm": "normalisation", "conv": "convolution", "linear": "linear"}
    return next((found for part, found in known.items() if part in name), "other weights")
