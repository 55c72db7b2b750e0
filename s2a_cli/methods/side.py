from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Backbone, Hidden
from s2a_cli.errors import UserError
from s2a_cli.methods.base import Method

HEADS = 4  # of the branch's attention


@dataclass
class SideConfig:
    reduction: int = 8  # the branch is as wide as the mean block divided by this
    grid: int = 7  # taps are pooled to at most grid x grid positions, class and register tokens apart


class Tap(nn.Module):
    """A detached hidden state, pooled without parameters to [B, N, width]: positions to a grid, channels by CAP.

    Channel average pooling (CAP): output j is the mean of C / width adjacent channels (of neighbouring, overlapping runs of
    channels where C is no multiple of the width).
    """

    def __init__(self, hidden: Hidden, width: int, grid: int):
        super().__init__()
        self.hidden, self.width, self.grid = hidden, width, grid

    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        prefix, patches = self.hidden.split(h)
        if patches.shape[-1] > 1:  # a map; tokens without a square grid stay as they are
            size = [min(n, self.grid) for n in patches.shape[-2:]]
            patches = F.adaptive_avg_pool2d(patches, size)
        tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        return F.adaptive_avg_pool1d(tokens, self.width)


class SideLayer(nn.Module):
    """s -> s + Attention(LayerNorm(s + LayerNorm(tap))), in the branch's width."""

    def __init__(self, width: int):
        super().__init__()
        self.tap_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, s: Tensor, tap: Tensor) -> Tensor:
        s = s + self.tap_norm(tap)
        q, k, v = self.qkv(self.norm(s)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return s + self.out(mixed)


class LiteSideBranch(nn.Module):
    """A ladder beside the backbone: reads pooled, detached taps and adds one vector [B, F] to the feature before the head.

    Nothing is back-propagated through the backbone. The merge is zero at the start. Source: S2A (arXiv 2503.08154), lite
    side branch and channel average pooling; mixing by attention and the zero-initialised merge are ours.
    """

    def __init__(self, taps: list[Hidden], width: int, grid: int, features: int):
        super().__init__()
        self.taps = nn.ModuleList(Tap(hidden, width, grid) for hidden in taps)
        self.layers = nn.ModuleList(SideLayer(width) for _ in taps)
        self.norm = nn.LayerNorm(width)
        self.merge = nn.Linear(width, features)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)
        self._read: list[Tensor] = []

    def read(self, index: int, h: Tensor) -> None:
        if index == 0:
            self._read = []
        self._read.append(self.taps[index](h))

    def forward(self) -> Tensor:
        s, self._read, taps = 0, [], self._read
        size = None
        for layer, tap in zip(self.layers, taps):
            if size and tap.shape[1] != size:
                s = F.adaptive_avg_pool1d(s.transpose(1, 2), tap.shape[1]).transpose(1, 2)
            s, size = layer(s, tap), tap.shape[1]
        return self.merge(self.norm(s).mean(1))


def add_side(backbone: Backbone, blocks: str, config: SideConfig) -> None:
    """Adds a lite side branch that reads the output of every adapted block. Raises UserError for a reduction above the width."""
    adapted = backbone.adapted_blocks(blocks)
    channels = sum(block.output.channels for block in adapted) // len(adapted)
    width = channels // config.reduction // HEADS * HEADS
    if not width:
        raise UserError(
            f"reduction={config.reduction} of the side branch leaves no width: blocks of {channels} channels on average"
            f" allow at most {channels // HEADS}"
        )
    branch = LiteSideBranch([block.output for block in adapted], width, config.grid, backbone.head.in_features)
    for index, block in enumerate(adapted):
        block.module.register_forward_hook(lambda _, __, h, index=index: branch.read(index, h))
    backbone.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + branch().to(inputs[0].dtype),))
    backbone.add("side", branch)


class Side(Method):
    """lite side branch (LSB): reads pooled hidden states; nothing is back-propagated through the backbone"""

    @dataclass
    class Config(SideConfig, Method.BlocksConfig):
        pass

    def attach(self, backbone):
        add_side(backbone, self.config.blocks, self.config)


METHOD = Side
