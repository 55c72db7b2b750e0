from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones.branches import Branch
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.thread_local import ThreadLocal


class ResAdapter(nn.Module):
    """y = U gelu(D x + b) + c for the channels of x; D [dim, C], U [C, dim].

    D Xavier-uniform, b and c ~ N(0, 1e-6); U likewise, or U = 0 and c = 0 with `zero`, so that y = 0 at the start.
    Source: Res-Tuning (arXiv 2310.19859), ResAdapter in swift/tuners/restuning_components.py of modelscope/swift, there
    with a shortcut of its own.
    """

    def __init__(self, channels: int, dim: int, zero: bool = False):
        super().__init__()
        self.down, self.up = nn.Linear(channels, dim), nn.Linear(dim, channels)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class BranchTuner(nn.Module):
    """Adds ResAdapter(x) to what a residual branch returns, for the normalised x that it reads."""

    _x = ThreadLocal[Tensor | None](None)  # what the branch reads, until it returns

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.adapter = ResAdapter(channels, dim, zero=True)

    def watch(self, branch: Branch) -> None:
        branch.norm.register_forward_hook(self.on_norm)
        branch.end.register_forward_hook(self.on_end)

    def on_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        self._x = output

    def on_end(self, end: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None, "the normalisation runs before the end of its branch"
        return output + self.adapter(x).to(output.dtype)


@dataclass
class ResTuningSettings(BlocksSettings):
    dim: int = setting(10, help="width of a Res-Adapter", rule=AT_LEAST_1)


class ResTuning(Structure):
    """Res-Tuning (arXiv 2310.19859): a Res-Adapter beside the attention and one beside the MLP of each block

    Departures: the paper also has Res-Prefix and Res-Prompt tuners, of which no code is public; here all are
    Res-Adapters, and the last layer of each is zero at the start. dim=10 is ours; the public code's default is 32.
    """

    Settings = ResTuningSettings
    families = ("vit", "swin")

    def attach(self, backbone, beside=()):
        """Adds a Res-Adapter beside both branches of every adapted block."""
        tuners = nn.ModuleList()
        for block in backbone.adapted_blocks(self.settings.blocks):
            if not block.branches:
                raise self.misfit(backbone, "its blocks have no residual branches of attention and MLP")
            for branch in block.branches:
                tuner = BranchTuner(block.input.channels, self.settings.dim)
                tuner.watch(branch)
                tuners.append(tuner)
        backbone.add("res_tuning", tuners)
        return Attachment(
            backbone, unmergeable="a Res-Adapter has an activation of its own: no weight of the backbone can hold it"
        )


STRUCTURE = ResTuning
