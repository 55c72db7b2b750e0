"""Operator families: what a breakdown of a step's memory is listed by.

The custom operators of `s2a_cli.activations` name their family where they are defined. Those of PyTorch are in a table.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from s2a_cli.activations.quant import primitives

# The order decides which family is named where several read a kept tensor.
FAMILIES = (
    "attention",
    "normalisation",
    "softmax",
    "activation",
    "convolution",
    "linear",
    "pooling",
    "loss",
    "optimiser",
    "codes",
)
OTHER = "elementwise and copies"
KEEPING = FAMILIES[:7]  # those that may keep what they read for the backward pass

# Names without the in-place `_`, `_backward`, and a leading `_`, see `_plain_name`.
_ATEN = {
    "attention": """scaled_dot_product_attention scaled_dot_product_attention_math
        scaled_dot_product_attention_math_for_mps scaled_dot_product_cudnn_attention
        scaled_dot_product_efficient_attention scaled_dot_product_flash_attention
        scaled_dot_product_flash_attention_for_cpu scaled_dot_product_fused_attention_overrideable
        efficient_attention flash_attention flash_attention_forward_no_dropout_inplace""",
    "normalisation": """batch_norm batch_norm_elemt batch_norm_gather_stats batch_norm_gather_stats_with_counts
        batch_norm_impl_index batch_norm_no_update batch_norm_stats batch_norm_update_stats batch_norm_with_update
        batch_norm_with_update_functional cudnn_batch_norm fused_rms_norm group_norm instance_norm layer_norm
        miopen_batch_norm native_batch_norm native_batch_norm_legit native_batch_norm_legit_functional
        native_batch_norm_legit_no_training native_group_norm native_layer_norm quantized_batch_norm rms_norm""",
    "softmax": "softmax safe_softmax",
    "activation": """elu gelu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu relu6 sigmoid silu
        softplus tanh threshold""",
    "convolution": """conv1d conv2d conv3d convolution convolution_double convolution_mode convolution_overrideable
        cudnn_convolution cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose
        miopen_convolution miopen_convolution_add_relu miopen_convolution_relu miopen_convolution_transpose
        miopen_depthwise_convolution mkldnn_convolution mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight
        mps_convolution mps_convolution_transpose nnpack_spatial_convolution slow_conv2d slow_conv3d thnn_conv2d""",
    "linear": "addbmm addmm addmm_activation addmv baddbmm bmm einsum linear matmul mm",
    "pooling": """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d max_pool1d
        max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d
        max_unpool3d mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d mkldnn_max_pool3d quantized_max_pool1d
        quantized_max_pool2d quantized_max_pool3d""",
    "loss": """binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss log_softmax mse_loss nll_loss
        nll_loss2d nll_loss_nd""",
    "optimiser": "fused_adagrad fused_adam fused_adamw fused_sgd amp_foreach_non_finite_check_and_unscale",
}
_FAMILY_OF = {name: family for family, names in _ATEN.items() for name in names.split()}
_KEEPS_RESULT = {
    *(name for name in _ATEN["attention"].split() if name.startswith("scaled_dot")),
    *("softmax", "relu", "relu6", "sigmoid", "tanh", "hardsigmoid", "log_softmax"),
    *(name for name in _ATEN["pooling"].split() if name.startswith("max_pool")),
}


def _plain_name(operator: Any) -> str:
    """Returns the name of an operator of PyTorch that it shares with its in-place and its backward forms."""
    name = operator._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_")
    for suffix in ("_backward", "_backward_data", "_backward_overrideable", "_backward_elemt", "_backward_reduce"):
        name = name.removesuffix(suffix)
    return name.removesuffix("_forward")


@functools.cache
def family(operator: Any) -> str:
    """Returns the family of an operator (torch.ops...default); a text is returned as it is, nothing gives OTHER."""
    if operator is None or isinstance(operator, str):
        return operator or OTHER
    namespace, _, name = operator._schema.name.partition("::")
    if namespace == "s2a":
        return primitives.FAMILIES[name]
    if namespace != "aten":
        return OTHER
    return "optimiser" if name.startswith("_foreach_") else _FAMILY_OF.get(_plain_name(operator), OTHER)


@functools.cache
def reads(operator: Any) -> str | None:
    """Returns the family of an operator that may keep what it reads for its backward pass, None for others.

    Custom operators are among the others: the autograd functions that call them keep what they return.
    """
    found = family(operator)
    is_custom = operator is not None and not isinstance(operator, str) and operator._schema.name.startswith("s2a::")
    return found if found in KEEPING and not is_custom else None


@functools.cache
def keeps_result(operator: Any) -> bool:
    """Returns whether an operator of PyTorch keeps what it returns for its backward pass."""
    if operator is None or isinstance(operator, str) or not operator._schema.name.startswith("aten::"):
        return False
    return _plain_name(operator) in _KEEPS_RESULT


def of_module(module: nn.Module) -> str:
    """Returns the family of a layer's weights."""
    name = type(module).__name__.lower()
    known = {"norm": "normalisation", "conv": "convolution", "linear": "linear"}
    return next((found for part, found in known.items() if part in name), "other weights")
