from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from s2a_cli.methods.base import Published
from s2a_cli.methods.parts.fact import Fact, Factors, FactSettings, Tiles


class TensorTrain(Factors):
    """Factors with a trained core for each layer, initialised as a linear layer."""

    def __init__(self, tiles: list[Tiles], channels: int, rank: int, scale: float, dropout: float):
        super().__init__(tiles, channels, rank, scale, dropout)
        self.cores = nn.ModuleList(nn.Linear(t.columns * rank, t.rows * rank, bias=False) for t in tiles)

    def core(self, index: int) -> Tensor:
        return cast(nn.Linear, self.cores[index]).weight


class FactTT(Fact):
    """FacT-TT (arXiv 2212.03145): low-rank updates of all weights; two factors shared by them all, a core each

    Source: JieShibo/PETL-ViT, FacT/fact_tt.py; rank 16 and s = 1 are among those of its configs (4 to 16; 0.01 to 100).
    Departures: their ViT also drops 0.1 of the paths, ours leaves that to the backbone's settings. Their code has no
    Swin: here the blocks of each width share two factors.
    """

    Settings = FactSettings
    Factors = TensorTrain
    published = Published(
        0.06144, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, fact_tt with fact_dim=16"
    )


STRUCTURE = FactTT
