"""A pair of linear layers with few numbers between them, and what stands there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Hidden


class Bottleneck(nn.Module):
    """scale * up(middle(down(x))) for x [..., C]: linear layers with biases, and `width` numbers between them."""

    def __init__(self, channels: int, width: int, middle: nn.Module, scale: float = 1.0):
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(channels, width), middle, nn.Linear(width, channels)
        self.scale = scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        added = self.up(self.middle(self.down(x)))
        return added if self.scale == 1 else added * self.scale


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU that CLIP uses. As silu(1.702 x) / 1.702 it keeps one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class OnMap(nn.Module):
    """Applies a module of maps [B, c, H, W] to x [B, ..., c], which has the positions of a hidden state.

    Class and register tokens come first and have no place on the map: each is a map of one position, as are tokens that
    others have put between them and the patches.
    """

    def __init__(self, hidden: Hidden, module: nn.Module):
        super().__init__()
        self.hidden = hidden
        self.module, self.patches, self.grid = module, hidden.positions - hidden.prefix, hidden.grid

    def on_block_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raises UserError for a hidden state of other positions. A pre-hook of the block, before others add tokens."""
        self.hidden.check(self.hidden.of((args, kwargs)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        alone, patches = tokens.split((tokens.shape[1] - self.patches, self.patches), dim=1)
        out = self.module(patches.transpose(1, 2).unflatten(-1, self.grid)).flatten(2).transpose(1, 2)
        if alone.numel():
            beside = self.module(alone.reshape(-1, alone.shape[-1], 1, 1)).reshape(alone.shape)
            out = torch.cat([beside, out], dim=1)
        return out.reshape(x.shape)
