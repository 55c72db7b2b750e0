from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.bottleneck import Bottleneck, OnMap
from s2a_cli.methods.parts.branch_adapter import adapt_branches
from s2a_cli.methods.parts.channels import per_sample


@dataclass
class MonaSettings(BlocksSettings):
    dim: int = setting(64, help="channels of the convolutions between the two linear layers", rule=AT_LEAST_1)
    dropout: float = setting(0.1, help="share of the numbers behind the convolutions that is dropped", rule=BELOW_1)


class ScaledNorm(nn.Module):
    """a (w x^ + c) + b x for x [..., C] and x^, x normalised over C; a = 1e-6, w = 1, c = 0 and b = 1 of each channel.

    a is multiplied into w and c, the affine part of the norm: a product with its output would keep that. w is stored
    less 1, so that the steps that its small gradients make are not rounded away, and weight decay draws it to 1.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((channels,), 1e-6)), nn.Parameter(torch.ones(channels))
        self.w_less_1, self.c = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], self.a * (1 + self.w_less_1), self.a * self.c)
        return normed + x * per_sample(self.b, x)


class Filters(nn.Module):
    """m + project(m) for a map x [B, c, H, W], with m = x + the mean of depthwise convolutions of 3x3, 5x5 and 7x7."""

    def __init__(self, channels: int):
        super().__init__()
        self.filters = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for size in (3, 5, 7)
        )
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        small, middle, large = (convolve(x) for convolve in self.filters)
        mean = (small + middle + large) / 3 + x
        return mean + self.project(mean)


class Mona(Structure):
    """Mona (arXiv 2311.15010): a bottleneck with 3x3, 5x5 and 7x7 depthwise filters, after each residual sum of a block

    x + up(dropout(gelu(filters(down(scaled_norm(x)))))), x being h + attention or h + MLP. The linear layers are drawn
    from N(0, 0.02) with biases 0, the convolutions as PyTorch's are by default: close to the pretrained function, not
    at it. Source: section 3.2 of the paper (as arXiv 2408.08345); Leiyi-Hu/mona, Swin-Transformer-Classification,
    mmcls/models/backbones/swin_transformer_mona.py.
    Departure: the source adapts Swin alone; on a ViT each class or register token is a map of one position.
    """

    Settings = MonaSettings
    starts_pretrained = False
    families = ("vit", "swin")

    def attach(self, backbone, beside=()):
        """Adds an adapter after both residual sums of every adapted block."""
        adapt_branches(self, backbone, self.adapter, reads="sum")
        return Attachment(backbone, unmergeable="an adapter has a nonlinearity: no weight of the backbone can hold it")

    def adapter(self, block: Block) -> nn.Module:
        """Returns one adapter."""
        channels, dim = block.input.channels, self.settings.dim
        middle = nn.Sequential(OnMap(block.input, Filters(dim)), nn.GELU(), nn.Dropout(self.settings.dropout))
        made = Bottleneck(channels, dim, middle)
        for layer in (made.down, made.up):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        return nn.Sequential(ScaledNorm(channels), made)


STRUCTURE = Mona
