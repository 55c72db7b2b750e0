from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.base import Published
from s2a_cli.methods.parts.fact import Fact, Factors, FactSettings, Tiles


class Tucker(Factors):
    """Factors whose cores are mixed from one: C [r, r, r], and P [r, matrices], a column for each matrix of C x C.

    The core of a matrix is T = sum_k C[:, :, k] P[k, matrix], transposed. C and P: Xavier, uniform.
    """

    def __init__(self, tiles: list[Tiles], channels: int, rank: int, scale: float, dropout: float):
        super().__init__(tiles, channels, rank, scale, dropout)
        self.ends = list(accumulate(one.number for one in tiles))  # of the layers' columns in P
        self.C, self.P = nn.Parameter(torch.empty(rank, rank, rank)), nn.Parameter(torch.empty(rank, self.ends[-1]))
        nn.init.xavier_uniform_(self.C)
        nn.init.xavier_uniform_(self.P)

    def core(self, index: int) -> Tensor:
        tiles, end = self.tiles[index], self.ends[index]
        mixed = self.C @ self.P[:, end - tiles.number : end]  # [r, r, matrices]
        if tiles.kind == "attention":
            return mixed.permute(2, 1, 0).flatten(0, 1)
        # In an MLP the published code lets the matrix be the fastest index of a row, not the slowest: its four cores
        # are shuffled columns of the four T.
        rows = mixed.flatten(1)
        return rows if tiles.rows == 1 else rows.T


@dataclass
class FactTKSettings(FactSettings):
    rank: int = setting(32, help="r of the factors", rule=AT_LEAST_1)


class FactTK(Fact):
    """FacT-TK (arXiv 2212.03145): low-rank updates of all weights; their factors and one core are shared by them all

    Source: JieShibo/PETL-ViT, FacT/fact_tk.py; rank 32 and s = 1 are among those of its configs (16 and 32; 0.01 to
    100).
    Departures: as of FacT-TT; weight decay, which theirs has on all that trains, is not on C and P. The MLPs' cores are
    the code's, which shuffles them, not the paper's.
    """

    Settings = FactTKSettings
    Factors = Tucker
    published = Published(
        0.086528, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, fact_tk with fact_dim=32"
    )


STRUCTURE = FactTK
