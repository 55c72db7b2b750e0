"""Small models that this package has not made: one of timm, and one written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import timm
import torch
from torch import nn

CLASSES = 5
NORMS = {  # whose statistics move in training
    "batch": nn.BatchNorm2d,
    "instance": functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
}


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes).eval()


class Unit(nn.Module):
    """A residual block of a network for maps [B, C, H, W]."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.norm, self.conv = norm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(self.norm(x)))


class Net(nn.Module):
    """Takes maps of two channels that are no square, and a mask."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.stem, self.units = nn.Conv2d(2, 8, 1), nn.ModuleList(Unit(8, norm) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES))

    def forward(self, x, mask):
        x = self.stem(x) * mask
        for unit in self.units:
            x = unit(x)
        return self.out(x.mean((2, 3)))


def net(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return Net(norm).eval()


def inputs(model: nn.Module, batch: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Net):
        return torch.randn(batch, 2, 6, 9, generator=generator), torch.ones(batch, 1, 6, 9)
    return (torch.randn(batch, 3, 16, 16, generator=generator),)


def targets(batch: int = 4) -> torch.Tensor:
    return torch.arange(batch) % CLASSES
