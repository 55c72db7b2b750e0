"""Stores the frozen weights of a backbone in another form: in fewer bits, or in the memory of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from s2a_cli.backbones import weight_offload, weight_quant
from s2a_cli.backbones.stored import Stored
from s2a_cli.common.errors import UserError

if TYPE_CHECKING:
    from s2a_cli.backbones.backbone import Backbone

CLASSES = {  # of a plain layer -> in fewer bits, in the memory of the host
    nn.Linear: (weight_quant.QuantizedLinear, weight_offload.OffloadedLinear),
    nn.Conv2d: (weight_quant.QuantizedConv2d, weight_offload.OffloadedConv2d),
}


def store(backbone: Backbone, kind: str, dtype: torch.dtype | None = None) -> None:
    """Stores the frozen weights of a backbone, to which a method is attached, as `kind`.

    `fp32` leaves them, as does `auto`, for which a plan chooses later.
    Takes Linear and Conv2d layers whose forward is called, outside the head and what the method added. Biases stay
    parameters. dtype: in which the layers will compute, where it is not that of the weights. Raises UserError where
    there is no such weight.
    """
    if kind in ("fp32", "auto"):
        return
    stored: list[Stored] = []
    for name, module in backbone.adapted_modules("all"):
        if type(module) not in CLASSES or module.weight.requires_grad or not backbone.runs(name):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        weight = cast(Tensor, module.weight)
        del module.weight
        in_bits, on_host = CLASSES[type(module)]
        module.__class__ = on_host if kind == "offload" else in_bits
        layer = cast(Stored, module)
        if isinstance(layer, weight_quant.Quantized):
            layer.kind = kind
        layer.take(weight.detach())
        stored.append(layer)
    if not stored:
        raise UserError(
            f"backbone.weights={kind}: this method freezes no weight of a Linear or Conv2d of the backbone; use fp32"
        )
    if kind == "offload":
        weight_offload.prepare(backbone, cast(list[weight_offload.Offloaded], stored), dtype)


def restore(model: nn.Module) -> None:
    """Turns the stored weights of a model back into parameters, of the values that it computes with."""
    plain = {stored: layer for layer, classes in CLASSES.items() for stored in classes}
    for module in model.modules():
        if isinstance(module, Stored):
            weight = module.weight
            for name in ("like", *module.FORM):
                delattr(module, name)
            module.__class__ = plain[type(module)]
            module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    weight_offload.remove(model)
