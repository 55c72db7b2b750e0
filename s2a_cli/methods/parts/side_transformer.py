"""A narrow transformer block, initialised from a wide one by structural pruning where that is made of such layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block


class NarrowBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of tokens [B, N, width]; biases everywhere, GELU."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def wide_layers(block: Block) -> tuple[nn.Module, ...] | None:
    """Returns norm1, qkv, proj, norm2, fc1 and fc2 of a backbone's block; None where it is not made of these."""
    if [branch.kind for branch in block.branches] != ["attention", "mlp"]:
        return None
    attention, mlp = block.branches
    found = (
        *(attention.norm, *(layer for _, layer in attention.linears)),
        *(mlp.norm, *(layer for _, layer in mlp.linears)),
    )
    shapes = [tuple(weight.shape) for layer in found if isinstance(weight := getattr(layer, "weight", None), Tensor)]
    channels, hidden = block.input.channels, shapes[-1][-1] if shapes else 0
    wanted = [(channels,), (3 * channels, channels), (channels, channels), (channels,), (hidden, channels)]
    return found if len(found) == 6 and shapes == [*wanted, (channels, hidden)] else None


@torch.no_grad()
def prune_into(narrow: NarrowBlock, block: Block, kept: Tensor | None = None) -> Tensor | None:
    """Copies to a narrow block what counts most of a wide one.

    Of each layer it takes the columns of the rows taken of the layer before, and of its rows those of largest L1 norm;
    the same of query, key and value, as many of each head. kept: the channels taken at the end of the block before;
    None: those whose columns in the query, key and value have the largest norm. Returns those taken at this block's
    end; None, and leaves `narrow` as it is, where the block has other layers, or no values (on the meta device).
    """
    layers = wide_layers(block)
    if layers is None or next(block.module.parameters()).is_meta:
        return None
    norm1, qkv, proj, norm2, fc1, fc2 = (cast(nn.Linear, layer) for layer in layers)
    if kept is None:
        kept = largest(qkv.weight.float().abs().sum(0), narrow.proj.in_features)
    _copy(narrow.norm1, norm1, kept)
    norms = qkv.weight.float()[:, kept].abs().sum(1).unflatten(0, (3, -1))
    rows = largest(norms.log().sum(0), narrow.proj.in_features, narrow.heads)  # of the product of the three
    _copy(narrow.qkv, qkv, torch.cat([rows + part * qkv.in_features for part in range(3)]), kept)
    rows = _prune(narrow.proj, proj, rows)
    _copy(narrow.norm2, norm2, rows)
    return _prune(narrow.fc2, fc2, _prune(narrow.fc1, fc1, rows))


def largest(numbers: Tensor, count: int, groups: int = 1) -> Tensor:
    """Returns the indices of the `count` largest numbers in order, as many of each of `groups` of neighbours.

    Where the groups would not be of one size there is only one.
    """
    groups = groups if len(numbers) % groups == 0 and count % groups == 0 else 1
    within = numbers.unflatten(0, (groups, -1)).topk(count // groups, dim=1).indices.sort(dim=1).values
    first = torch.arange(groups, device=numbers.device) * (len(numbers) // groups)
    return (within + first[:, None]).flatten()


def _prune(mine: nn.Linear, other: nn.Linear, columns: Tensor) -> Tensor:
    """Copies, of these columns, the rows of largest L1 norm. Returns which."""
    rows = largest(other.weight.float()[:, columns].abs().sum(1), mine.out_features)
    _copy(mine, other, rows, columns)
    return rows


def _copy(mine: nn.Module, other: nn.Module, rows: Tensor, columns: Tensor | None = None) -> None:
    """Copies rows, and of them columns, of a layer's weight and bias; a bias that is not there is zero."""
    mine, other = cast(nn.Linear, mine), cast(nn.Linear, other)
    mine.weight.copy_(other.weight[rows] if columns is None else other.weight[rows][:, columns])
    mine.bias.copy_(other.bias[rows]) if other.bias is not None else mine.bias.zero_()
