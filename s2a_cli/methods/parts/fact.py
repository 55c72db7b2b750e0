"""Factor-Tuning: the updates of all weight matrices of a transformer as one tensor, in factors that they share."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2a_cli.backbones import Backbone, Block
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure

ATTENTION_TILES = 4  # the matrices of queries, keys, values and outputs, C x C each


@dataclass(frozen=True)
class Tiles:
    """A linear layer whose weight is `rows` x `columns` matrices of C x C. kind: of its branch."""

    layer: nn.Linear
    kind: str
    rows: int
    columns: int

    @property
    def number(self) -> int:
        return self.rows * self.columns


class Factors(nn.Module):
    """Adds s V S_ij U to the matrix ij of C x C in the weight of each layer, U [r, C] and V [C, r] shared by all.

    y = W x + s V drop(S U x), S [rows * r, columns * r] the layer's own. Where the output is several times as wide as a
    hidden state, or the input, S has a block for each part of it. U is initialised as a linear layer, V zero. U x is
    small, but the gradient of U needs x: every adapted layer keeps its input.
    Source: FacT (arXiv 2212.03145); JieShibo/PETL-ViT, FacT/fact_tt.py and fact_tk.py.
    """

    def __init__(self, tiles: list[Tiles], channels: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.tiles, self.rank, self.scale = tiles, rank, scale
        self.U, self.V = nn.Linear(channels, rank, bias=False), nn.Linear(rank, channels, bias=False)
        nn.init.zeros_(self.V.weight)
        self.dropout = nn.Dropout(dropout)

    def core(self, index: int) -> Tensor:
        """Returns S of a layer."""
        raise TypeError(f"{type(self).__name__} does not say what its cores are")

    def update(self, index: int, x: Tensor) -> Tensor:
        """Returns s V drop(S U x) of a layer."""
        tiles = self.tiles[index]
        read = self.U(x.unflatten(-1, (tiles.columns, -1))).flatten(-2)
        mixed = self.dropout(nn.functional.linear(read, self.core(index)))
        return self.scale * self.V(mixed.unflatten(-1, (tiles.rows, -1))).flatten(-2)

    def on_output(self, index: int, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds the update to what a layer returns. A hook of the layer that is number `index`."""
        return output + self.update(index, args[0])

    def merge(self, index: int) -> None:
        """Adds s V S U to the weight of a layer."""
        tiles = self.tiles[index]
        core = self.core(index).unflatten(0, (tiles.rows, -1)).unflatten(-1, (tiles.columns, -1))
        whole = torch.einsum("ca,iajb,bd->icjd", self.V.weight, core, self.U.weight)
        tiles.layer.weight += self.scale * whole.reshape(tiles.layer.weight.shape)


@dataclass
class FactSettings(BlocksSettings):
    rank: int = setting(16, help="r of the factors", rule=AT_LEAST_1)
    scale: float = setting(1.0, help="s of the update; chosen from 0.01 to 100 for each data set", rule=POSITIVE)
    dropout: float = setting(0.1, help="share of the numbers before V that are dropped in training", rule=BELOW_1)


class Fact(Structure):
    """What FacT-TT and FacT-TK share: which layers there are, their hooks, and that the update is merged exactly."""

    families = ("vit", "swin")
    Factors: type[Factors]

    def attach(self, backbone, beside=()):
        settings, groups, merges = self.settings, [], []
        blocks = backbone.adapted_blocks(settings.blocks)
        for channels in dict.fromkeys(block.input.channels for block in blocks):  # blocks of one width share factors
            tiles = [t for b in blocks if b.input.channels == channels for t in self.tiles(backbone, b)]
            factors = self.Factors(tiles, channels, settings.rank, settings.scale, settings.dropout)
            for index, one in enumerate(tiles):
                one.layer.register_forward_hook(functools.partial(factors.on_output, index))
                merges.append((one.layer, functools.partial(factors.merge, index)))
            groups.append(factors)
        backbone.add(self.name, nn.ModuleList(groups))
        return Attachment(backbone, merges=tuple(merges))

    def tiles(self, backbone: Backbone, block: Block) -> list[Tiles]:
        """Returns the layers of a block's branches. Raises UserError where they are no matrices of C x C."""
        found = [
            self._tiles(backbone, layer, branch.kind, block.input.channels)
            for branch in block.branches
            for _, layer in branch.linears
        ]
        if _count(found, "attention") != ATTENTION_TILES or not _count(found, "mlp"):
            raise self.misfit(backbone, "not every block is an attention of four linear maps and an MLP")
        return found

    def _tiles(self, backbone: Backbone, layer: nn.Module, kind: str, channels: int) -> Tiles:
        if not isinstance(layer, nn.Linear) or layer.out_features % channels or layer.in_features % channels:
            raise self.misfit(backbone, "its layers are not made of linear maps of a hidden state's width")
        return Tiles(layer, kind, layer.out_features // channels, layer.in_features // channels)


def _count(tiles: Iterable[Tiles], kind: str) -> int:
    return sum(one.number for one in tiles if one.kind == kind)
