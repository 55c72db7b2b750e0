from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.channels import per_sample

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class ScaleAndShift(nn.Module):
    """s y + b for the output y of a layer, with a scale s and a shift b of each of its C channels.

    s ~ N(1, 0.02), b ~ N(0, 0.02). The gradient of s needs y, so all outputs are kept, or their codes.
    """

    def __init__(self, channels: int, last: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(channels).normal_(0, 0.02))
        self.last = last  # whether y has the channels in its last dimension, rather than in its second

    def on_output(self, layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
        """Scales and shifts. A forward hook of the layer."""
        return (y * per_sample(self.scale, y, self.last)).add_(per_sample(self.shift, y, self.last))

    def merge_into(self, layer: nn.Module) -> None:
        """Makes scale and shift part of the weight [C, ...] and the bias [C] of the layer."""
        weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
        weight.mul_(self.scale.view(-1, *(1,) * (weight.ndim - 1)))
        bias.mul_(self.scale).add_(self.shift)


class SSF(Structure):
    """SSF (arXiv 2210.08823): a scale and a shift of channels behind every linear layer, convolution and norm; merges

    Source: section 3.2 of the paper; dongzelian/SSF, models/vision_transformer.py, swin_transformer.py and convnext.py.
    Behind each layer that has a bias, for the shift to merge into, the patch embedding and the final norm among them.
    Departures: the last scale and shift of a ConvNeXt are behind its last norm, as in other families; there they are
    before the pooling. A ResNet, whose convolutions have no bias, is adapted behind its norms.
    """

    Settings = BlocksSettings
    starts_pretrained = False
    families = ("vit", "swin", "convnext", "resnet")
    published = Published(0.21, "V-PETL Bench, README: benchmark results on VTAB")

    def attach(self, backbone, beside=()):
        """Adds scale and shift behind every layer with a bias that runs in or after the first adapted block."""
        added, merges = nn.ModuleList(), []
        for name, module in backbone.adapted_modules(self.settings.blocks):
            if not isinstance(module, LAYERS + NORMS) or module.bias is None or not backbone.runs(name):
                continue
            if not is_plain(module):
                raise self.misfit(backbone, f"its {type(module).__name__} computes more than its weight and bias do")
            if cast(Tensor, module.bias).ndim != 1:
                raise self.misfit(backbone, f"{name} is a {type(module).__name__} of more than channels")
            found = ScaleAndShift(len(cast(Tensor, module.bias)), channels_last(module))
            module.register_forward_hook(found.on_output)
            added.append(found)
            merges.append((module, functools.partial(found.merge_into, module)))
        backbone.add(self.name, added)
        return Attachment(backbone, merges=tuple(merges))


def is_plain(module: nn.Module) -> bool:
    """Tells whether a layer is linear in its weight and bias: no standardised weight, no norm with an activation."""
    if isinstance(module, LAYERS):
        return type(module).forward in [layer.forward for layer in LAYERS]
    return not list(module.children())


def channels_last(module: nn.Module) -> bool:
    """Tells whether what a layer returns has the channels in its last dimension."""
    return isinstance(module, nn.Linear | nn.LayerNorm) and not type(module).__name__.endswith("2d")


STRUCTURE = SSF
