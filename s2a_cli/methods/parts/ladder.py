"""A ladder of small layers beside the backbone, which climbs its hidden states and adds to the feature of the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Hidden
from s2a_cli.common.hooks import reads_output_only
from s2a_cli.methods.parts.head_input import head_alone
from s2a_cli.methods.parts.thread_local import HandedOn

HEADS = 4  # of attention in the branch

Shape = tuple[int, int, int]  # of tokens: class and register tokens, height and width of the map


class AveragedChannels(nn.Module):
    """Channel average pooling (CAP) of a detached hidden state: tokens [B, P + H W, width], without parameters.

    Output j is the mean of C / width adjacent channels (of neighbouring runs that overlap where C is no multiple of the
    width). Positions are averaged to at most grid x grid.
    """

    def __init__(self, hidden: Hidden, width: int, grid: int):
        super().__init__()
        self.hidden, self.width, self.grid = hidden, width, grid

    @torch.no_grad()
    def forward(self, h: Tensor) -> tuple[Tensor, Shape]:
        prefix, patches = self.hidden.split(h)
        if patches.shape[-1] > 1:  # a map; tokens without a square grid stay as they are
            height, width = (min(n, self.grid) for n in patches.shape[-2:])
            patches = F.adaptive_avg_pool2d(patches, (height, width))
        tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        shape = prefix.shape[1], patches.shape[2], patches.shape[3]
        return F.adaptive_avg_pool1d(tokens.float(), self.width), shape


class Attention(nn.Module):
    """g(z) = W Attention(LayerNorm(z)) + b: self-attention of the tokens [B, N, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(z)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Ladder(nn.Module):
    """s_l = s_(l-1) + g_l(CAP(h_l) + s_(l-1)) for the detached hidden states h_l; s_0 = 0.

    The mean of the last s over its positions, normalised, is added to what each layer of the head reads, through a
    projection that is zero at the start. Nothing is back-propagated through the backbone.
    """

    _state = HandedOn[tuple[Tensor, Shape] | None](None)  # s and the shape of its tokens

    def __init__(self, states: Sequence[Hidden], width: int, grid: int, heads: Iterable[nn.Linear | nn.Conv2d]):
        super().__init__()
        self.averages = nn.ModuleList(AveragedChannels(hidden, width, grid) for hidden in states)
        self.layers = nn.ModuleList(Attention(width) for _ in states)
        self.norm = nn.LayerNorm(width)
        self.merges = nn.ModuleList(_zero(nn.Linear(width, head.weight.shape[1])) for head in heads)

    @reads_output_only
    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """Climbs from one hidden state to the next. A hook of the block that is read as number `index`."""
        average = cast(AveragedChannels, self.averages[index])
        tokens, shape = average(average.hidden.of(output))
        tokens = tokens.to(self.norm.weight.dtype)
        before, self._state = self._state, None
        if index == 0 or before is None:
            self._state = self.layers[index](tokens), shape
        else:
            s = resized(*before, shape)
            self._state = s + self.layers[index](tokens + s), shape

    def on_head_input(self, index: int, head: nn.Module, args: tuple) -> tuple:
        """Adds to the feature [B, C], [B, C, 1, 1] or [B, N, C]. A pre-hook of layer number `index` of the head.

        Raises UserError where the blocks have not run before.
        """
        if self._state is None:
            raise head_alone()
        added = self.merges[index](self.norm(self._state[0]).mean(1))
        if index + 1 == len(self.merges):
            self._state = None
        x, *others = args
        channels = added.shape[1]
        shape = (channels, 1, 1) if isinstance(head, nn.Conv2d) else (*[1] * (x.ndim - 2), channels)
        return (x + added.to(x.dtype).view(x.shape[0], *shape), *others)


def _zero(layer: nn.Linear) -> nn.Linear:
    """Returns the layer with zeros in it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def resized(s: Tensor, before: Shape, now: Shape) -> Tensor:
    """Averages the map of tokens to another size, where the backbone has fewer positions from one block to the next.

    Class tokens that were not there before are the map's mean.
    """
    if before == now:
        return s
    prefix, patches = s[:, : before[0]], s[:, before[0] :].transpose(1, 2).unflatten(-1, before[1:])
    if before[0] != now[0]:
        prefix = patches.mean((2, 3))[:, None].expand(-1, now[0], -1)
    return torch.cat([prefix, F.adaptive_avg_pool2d(patches, now[1:]).flatten(2).transpose(1, 2)], dim=1)
