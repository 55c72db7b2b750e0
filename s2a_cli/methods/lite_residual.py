from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block
from s2a_cli.config.rules import number
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.bias import Bias

CHANNELS_PER_GROUP = 8  # of the group normalisations
DIVISOR = 8  # of the width of a module
EPS = 1e-5  # added to the standard deviation of a kernel


class StandardConv2d(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1 (weight standardisation, arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = centred.flatten(1).std(1).view(-1, 1, 1, 1)
        return self._conv_forward(x, centred / (std + EPS), self.bias)


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns a normalisation of groups of 8 channels, or the largest number below that divides them."""
    size = next(size for size in range(CHANNELS_PER_GROUP, 0, -1) if channels % size == 0)
    return nn.GroupNorm(channels // size, channels)


class LiteResidual(nn.Module):
    """y = up(norm(C2 relu(norm(C1 pool(x))))), which is added to what a block makes of its input x.

    pool: the mean of 2 x 2 positions, so that little is kept for backward. C1: a k x k convolution with the block's
    stride in `groups` groups; C2: 1 x 1; both with standardised kernels and without bias. up: bilinear, to the block's
    output. Where pooling leaves one position it is over all of them, with k = 1; k is no larger than what is pooled.
    C1, C2 ~ N(0, 2 / fan out), and the last normalisation has weight and bias 0, so that y = 0 at the start.
    Source: TinyTL (arXiv 2007.11622), LiteResidualModule in tinytl/model/modules.py of mit-han-lab/tinyml; the last
    bias is not trained, as the block's own biases are.
    Departures: the modules are not pretrained with the backbone (`random_init_lite_residual`); the backbone keeps its
    own normalisations and kernels; y is added to what a block returns, after its shortcut and its last activation.
    """

    def __init__(self, block: Block, kernel: int, groups: int, expand: float):
        super().__init__()
        self.input, self.output = block.input, block.output
        channels, outputs = block.input.channels, block.output.channels
        (before, _), (after, _) = block.input.grid, block.output.grid
        pooled = max(1, before // 2)
        self.globally = pooled == 1
        kernel = 1 if self.globally else min(kernel, pooled - (pooled + 1) % 2)
        width = max(DIVISOR, int(channels * expand + DIVISOR / 2) // DIVISOR * DIVISOR)
        stride = math.ceil(before / after)
        groups = math.gcd(groups, channels, width)
        self.conv1 = StandardConv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm1 = group_norm(width)
        self.conv2 = StandardConv2d(width, outputs, 1, bias=False)
        self.norm2 = group_norm(outputs)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns y [B, C, *size] for a map x [B, C, H, W]."""
        pooled = F.adaptive_avg_pool2d(x, 1) if self.globally else F.avg_pool2d(x, 2)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(pooled)))))
        return y.expand(-1, -1, *size) if self.globally else F.interpolate(y, size, mode="bilinear")

    def on_block_output(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Adds y to the hidden state among what a block returns. A hook of the block."""
        _, x = self.input.split(self.input.of((args, kwargs)))
        h = self.output.of(output)
        is_first = self.output.layout == "channels_first"
        y = self(x, (h.shape[-2], h.shape[-1]) if is_first else (h.shape[1], h.shape[2]))
        return self.output.replaced(output, h + (y if is_first else y.permute(0, 2, 3, 1)).to(h.dtype))


@dataclass
class LiteResidualSettings(BlocksSettings):
    bias: bool = setting(True, help="trains every bias of the adapted blocks as well, as TinyTL does")
    kernel: int = setting(
        5,
        help="of the grouped convolution; smaller where there are fewer positions",
        rule=number("an odd integer from 1 to 31", lambda value: value % 2 == 1 and 1 <= value <= 31),
    )
    groups: int = setting(2, help="of the grouped convolution", rule=AT_LEAST_1)
    expand: float = setting(
        1.0,
        help="width of a module, times the channels that its block takes: 1 for MobileNets, whose blocks take few",
        rule=number("a number above 0, at most 16", lambda value: 0 < value <= 16),
    )


class LiteResidualStructure(Structure):
    """TinyTL (arXiv 2007.11622): biases, and a lite residual module beside each block, at half its resolution"""

    Settings = LiteResidualSettings
    families = ("swin", "convnext", "resnet", "mobilenet")

    def attach(self, backbone, beside=()):
        """Adds a lite residual module beside every adapted block, and unfreezes the blocks' biases."""
        settings, blocks = self.settings, backbone.adapted_blocks(self.settings.blocks)
        if any(len(block.input.shape) != 3 or len(block.output.shape) != 3 for block in blocks):
            raise self.misfit(backbone, "its hidden states are tokens, no maps")
        if settings.bias:
            Bias(SimpleNamespace(blocks=settings.blocks)).attach(backbone, beside)
        modules = [LiteResidual(block, settings.kernel, settings.groups, settings.expand) for block in blocks]
        for block, module in zip(blocks, modules):
            if settings.bias:
                module.norm2.bias.requires_grad_(False)
            block.module.register_forward_hook(module.on_block_output, with_kwargs=True)
        backbone.add("lite_residual", nn.ModuleList(modules))
        return Attachment(
            backbone,
            unmergeable="a lite residual module has an activation of its own: no weight of the backbone can hold it",
        )


STRUCTURE = LiteResidualStructure
