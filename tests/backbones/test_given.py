"""The classifier of a module that others made: it returns what the module returns, or is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from s2a_cli.backbones.given import of_module
from s2a_cli.backbones.hidden import grid_like
from s2a_cli.common.errors import UserError

FAMILIES = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
    *("eva02_tiny_patch14_224", "test_convnext", "test_resnet", "mobilenetv3_small_050"),
)


def of_timm(name: str, classes: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=classes)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Pooled(nn.Module):
    """Blocks and a mean over tokens, with nothing behind."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 8), nn.Sequential(*(Residual(8) for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_timm_without_a_classifier_is_refused(name):
    with pytest.raises(UserError, match=r"has no classifier: no linear layer runs .*; give it one \(of timm"):
        of_module(of_timm(name, 0))


def test_a_model_without_a_classifier_is_refused_within_another():
    with pytest.raises(UserError, match=r"has no classifier: 0\.norm runs behind 0\.blocks\.11\.mlp\.fc2"):
        of_module(nn.Sequential(of_timm("vit_tiny_patch16_224", 0)))


def test_a_classifier_that_somebody_put_there_is_taken():
    model = of_timm("vit_tiny_patch16_224", 0)
    model.head = nn.Linear(192, 5, device="meta")
    assert list(of_module(model).head.layers) == ["head"]
    model.head = nn.Sequential(nn.Linear(192, 9, device="meta"), nn.ReLU(), nn.Linear(9, 5, device="meta"))
    assert list(of_module(model).head.layers) == ["head.2"]


@pytest.mark.parametrize(("name", "layers"), [("deit_tiny_distilled_patch16_224", 2), ("levit_128s", 2), ("dla34", 1)])
def test_classifiers_of_several_layers_and_convolutions_are_taken(name, layers):
    assert len(of_module(of_timm(name, 5)).head.layers) == layers


def test_what_runs_behind_a_classifier_has_no_parameters():
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    squeezed = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 5, 1), tail)
    sample = (torch.empty(3, 16, 16),)
    assert list(of_module(squeezed, sample=sample).head.layers) == ["2"]
    with pytest.raises(UserError, match="Sequential has no classifier: 4 runs behind 2"):
        of_module(nn.Sequential(*squeezed, nn.LayerNorm(5)), sample=sample)
    with pytest.raises(UserError, match="head=0: 2 runs behind 0"):
        of_module(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1), tail), sample=sample, head="0")


def test_a_layer_of_a_repeated_block_is_no_classifier():
    model, sample = Pooled(), (torch.empty(4, 6),)
    with pytest.raises(UserError, match=r"blocks\.2\.down is within blocks\.2, a repeated block"):
        of_module(model, sample=sample)
    assert list(of_module(nn.Sequential(model, nn.Linear(8, 5)), sample=sample).head.layers) == ["1"]


@pytest.mark.parametrize(
    ("name", "image", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", (64, 96), 1, (4, 6)),  # 25 tokens are no square of patches
        ("vit_tiny_patch16_224", (32, 128), 1, (2, 8)),  # nor are 16 patches
        ("vit_tiny_patch16_224", (64, 64), 1, (4, 4)),
        ("cait_xxs24_224", (64, 96), 0, (4, 6)),  # its blocks have no class token, though it says so
        ("cait_xxs24_224", (64, 64), 0, (4, 4)),
    ],
)
def test_patches_are_a_map_like_the_image(name, image, prefix, grid):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=image, depth=1)
    found = of_module(model, sample=(torch.empty(3, *image, device="meta"),)).blocks[0].input
    assert (found.prefix, found.grid) == (prefix, grid)


@pytest.mark.parametrize(
    ("image", "patches", "grid"),
    [
        ((220, 224), 784, (28, 28)),  # a stride of 8, rounded up
        ((220, 224), 3080, (55, 56)),
        ((70, 64), 16, (4, 4)),  # a stride of 16, rounded down
        ((70, 64), 17, None),  # with a class token
        ((64, 96), 25, None),
        ((96, 64), 24, (6, 4)),
        ((64, 64), 2, None),
    ],
)
def test_a_map_is_what_one_stride_makes_of_an_image(image, patches, grid):
    assert grid_like(image, patches) == grid
