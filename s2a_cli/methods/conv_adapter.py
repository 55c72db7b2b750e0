from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block
from s2a_cli.backbones.branches import Branch
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.thread_local import ThreadLocal

# Class names in lower case, of torch and of timm, which has some of its own.
ACTIVATIONS = {
    "relu",
    "relu6",
    "leakyrelu",
    "elu",
    "gelu",
    "gelutanh",
    "quickgelu",
    "silu",
    "swish",
    "hardswish",
    "mish",
}
ATTENTION_KERNEL = 7  # beside the attention of Swin, as in the source


class ConvAdapter(nn.Module):
    """y = s * (U act(D x)) for a map x: D a k x k convolution to `width` channels, each of a group of its own; U 1 x 1.

    D and U have biases, s scales each channel. D and U as PyTorch draws them, s = 1: y is not zero at the start.
    Source: Conv-Adapter (arXiv 2208.07463), ConvAdapter in models/tuning_modules/conv_adapter.py. `act` is the
    activation of the block, k, stride, padding and dilation are those of the convolution that it stands beside.
    Departures: s multiplies U's weights instead of the map, which is the same and keeps no map for backward; the
    convolutions between stages of ConvNeXt have none; in a bottleneck of ResNet it adds to what the convolution
    returns, as there in BasicBlocks, BiT and ConvNeXt, and not after the activation.
    """

    _x = ThreadLocal[Tensor | None](None)  # what the attention beside it reads, until that returns

    def __init__(
        self,
        channels: int,
        outputs: int,
        reduction: int,
        act: nn.Module,
        kernel: Any,
        kind: type = nn.Conv2d,
        **geometry: Any,
    ):
        super().__init__()
        width = max(1, channels // reduction)
        while channels % width:  # the groups are of one size
            width -= 1
        self.down = kind(channels, width, kernel, groups=width, **geometry)
        self.act = act
        self.up = nn.Conv2d(width, outputs, 1)
        self.scale = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight * self.scale.view(-1, 1, 1, 1)
        return F.conv2d(self.act(self.down(x)), weight, cast(Tensor, self.up.bias) * self.scale)

    def on_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds y of what a module, a convolution or a whole block, takes. A hook of it."""
        return output + self(args[0])

    def on_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        """Notes what an attention reads. A hook of the normalisation before it."""
        self._x = output

    def on_end(self, end: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds y to what an attention adds to a hidden state [B, H, W, C]. A hook of the end of its branch."""
        x, self._x = self._x, None
        assert x is not None, "the normalisation runs before the end of its branch"
        return output + self(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def activation(block: nn.Module) -> nn.Module:
    """Returns a copy of the first activation of a block; a ReLU where there is none."""
    found = next((module for module in block.modules() if type(module).__name__.lower() in ACTIVATIONS), nn.ReLU())
    found = copy.deepcopy(found)
    if hasattr(found, "inplace"):
        setattr(found, "inplace", False)  # noqa: B010 (a property that no stub of nn.Module has)
    return found


def widest_kernel(block: Block) -> nn.Conv2d | None:
    """Returns the first convolution of a block among those of the largest kernel."""
    found = [layer for _, layer in block.layers if isinstance(layer, nn.Conv2d)]
    return max(found, key=lambda layer: layer.kernel_size, default=None)


@dataclass
class ConvAdapterSettings(BlocksSettings):
    reduction: int = setting(4, help="of the channels: an adapter has 1/reduction of those it reads", rule=AT_LEAST_1)


class ConvAdapterStructure(Structure):
    """Conv-Adapter (arXiv 2208.07463): a small grouped convolution and a 1 x 1 one beside each k x k convolution"""

    Settings = ConvAdapterSettings
    starts_pretrained = False
    families = ("swin", "convnext", "resnet", "mobilenet")

    def attach(self, backbone, beside=()):
        """Adds an adapter beside the k x k convolution of each adapted block.

        Beside the whole block where that convolution has more channels than the block takes and returns, as in
        MobileNet; in a transformer of maps beside its attention.
        """
        adapters = nn.ModuleList()
        for block in backbone.adapted_blocks(self.settings.blocks):
            if block.branches and block.input.layout == "channels_last":
                adapters.append(self._beside_attention(block, block.branch("attention")))
            elif block.input.layout == "channels_first" and (conv := widest_kernel(block)) is not None:
                adapters.append(self._beside_convolution(block, conv))
            else:
                raise self.misfit(backbone, "its blocks have neither maps with attention nor convolutions")
        backbone.add("conv_adapter", adapters)
        return Attachment(
            backbone, unmergeable="a Conv-Adapter has an activation of its own: no weight of the backbone can hold it"
        )

    def _beside_attention(self, block: Block, branch: Branch) -> ConvAdapter:
        channels = block.input.channels
        adapter = ConvAdapter(
            channels,
            channels,
            self.settings.reduction,
            activation(block.module),
            ATTENTION_KERNEL,
            padding=ATTENTION_KERNEL // 2,
        )
        branch.norm.register_forward_hook(adapter.on_norm)
        branch.end.register_forward_hook(adapter.on_end)
        return adapter

    def _beside_convolution(self, block: Block, conv: nn.Conv2d) -> ConvAdapter:
        act, reduction, (into, out) = activation(block.module), self.settings.reduction, (block.input, block.output)
        if max(conv.in_channels, conv.out_channels) > max(into.channels, out.channels):
            kernel, stride = conv.kernel_size, tuple(-(-a // b) for a, b in zip(into.shape[1:], out.shape[1:]))
            padding = tuple(k // 2 for k in kernel)
            adapter = ConvAdapter(into.channels, out.channels, reduction, act, kernel, stride=stride, padding=padding)
            block.module.register_forward_hook(adapter.on_output)
        else:
            geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
            kind = Conv2dSame if "Same" in type(conv).__name__ else nn.Conv2d  # timm's, which pads as its input wants
            adapter = ConvAdapter(
                conv.in_channels, conv.out_channels, reduction, act, conv.kernel_size, kind, **geometry
            )
            conv.register_forward_hook(adapter.on_output)
        return adapter


STRUCTURE = ConvAdapterStructure
