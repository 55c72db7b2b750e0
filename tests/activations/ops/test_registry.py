"""Operators are registered in one place: handlers with the settings that turn them on, custom operators by family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli.activations import compress_activations
from s2a_cli.activations.ops.registry import HANDLERS, handlers_of, register
from s2a_cli.activations.quant import primitives
from s2a_cli.config.schema import QuantConfig
from s2a_cli.memory import families, observe


def defined() -> set[str]:
    """The names of the custom operators that exist."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("s2a::"))
    return {name.removeprefix("s2a::").split(".")[0] for name in names}


def test_every_custom_operator_has_a_family_that_is_known():
    assert defined() == primitives.FAMILIES.keys() == primitives.PLAIN.keys()
    assert set(primitives.FAMILIES.values()) <= set(families.FAMILIES)
    for name in defined():
        operator = getattr(torch.ops.s2a, name).default
        assert families.family(operator) == primitives.FAMILIES[name]
        assert families.reads(operator) is None, "it has no derivative, so it keeps nothing of what it reads"


@pytest.mark.parametrize(
    "name, family",
    [
        ("gelu", "activation"),
        ("relu_", "activation"),
        ("threshold_backward", "activation"),
        ("_softmax_backward_data", "softmax"),
        ("_log_softmax", "loss"),
        ("native_layer_norm_backward", "normalisation"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("convolution_backward", "convolution"),
        ("baddbmm_", "linear"),
        ("max_pool2d_with_indices_backward", "pooling"),
        ("nll_loss_forward", "loss"),
        ("_foreach_add_", "optimiser"),
        ("_fused_adamw_", "optimiser"),
        ("add_", families.OTHER),
    ],
)
def test_operators_of_pytorch_are_known_by_name(name, family):
    packet = getattr(torch.ops.aten, name)
    assert families.family(getattr(packet, packet.overloads()[0])) == family


def test_the_bit_of_a_relu_counts_as_that_of_an_activation():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    model.requires_grad_(False)[0].bias.requires_grad_()
    images, memory = torch.randn(4, 3, 16, 16), compress_activations(QuantConfig(lossless=True))

    def step(model, optimizer, x, after_forward):
        with memory:
            loss = model(x).square().mean()
        after_forward()
        loss.backward()

    found = observe(model, (images,), step, lambda m: torch.optim.SGD([m[0].bias]))
    kept = found.by("family", uses=("kept",))
    assert kept["activation",] == 4 * 8 * 16 * 16 // 8 and ("codes",) not in kept


def test_settings_turn_handlers_on():
    assert handlers_of(QuantConfig(lossless=False)) == {}
    assert F.relu in handlers_of(QuantConfig(lossless=True)) and F.gelu not in handlers_of(QuantConfig(lossless=True))
    for field in ("attention", "softmax"):
        assert F.scaled_dot_product_attention in handlers_of(QuantConfig(lossless=False, **{field: 4}))
    settings = {field for handler in HANDLERS.values() for field in handler.bits} - {None}
    assert settings <= vars(QuantConfig()).keys()


def test_a_function_has_one_handler():
    with pytest.raises(ValueError, match="has a handler already"):
        register({F.gelu: lambda op, stock, input: NotImplemented}, "pointwise")
