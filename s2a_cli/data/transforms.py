"""Turns a PIL image into the tensor that a backbone expects; all randomness comes from torch's generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest
from s2a_cli.config.schema import DatasetConfig

ELONGATED = 50  # times; a panorama has 10
INTERPOLATIONS = {mode.value: mode for mode in v2.InterpolationMode}


@dataclass(frozen=True)
class ImageConfig:
    """The images that a backbone was pretrained on: `size` pixels square, with `mean` and `std` of RGB in [0, 1].

    `crop_pct` is the share of the shorter side that the centre crop of evaluation keeps.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @property
    def resize(self) -> int:
        """Returns the pixels of the shorter side before the centre crop, rounded down as for timm's own figures."""
        return math.floor(self.size / self.crop_pct)


@dataclass(frozen=True)
class Transform:
    """Turns an RGB PIL image into a tensor [3, size, size]: normalised in float32, or pixels in uint8."""

    steps: v2.Compose
    at_least: int  # pixels of the shorter side; a larger image would not give another result

    def __call__(self, image: Image.Image) -> Tensor:
        return self.steps(_middle(image))


def _middle(image: Image.Image) -> Image.Image:
    """Returns the middle of an image that is more than ELONGATED times as long as wide, and any other as it is.

    Made as wide as a model needs, a line of pixels would take memory without bound, for a crop of its middle.
    """
    width, height = image.size
    most = ELONGATED * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = (max(0, side - most) // 2 for side in (width, height))
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def build_transform(image: ImageConfig, config: DatasetConfig, train: bool, normalise: bool = True) -> Transform:
    """Returns the transform of training or of evaluation.

    Training: a random resized crop of `config.scale` of the area (null: as in evaluation) and a horizontal flip with
    probability `config.hflip`. Evaluation: the shorter side resized to size / crop_pct, then the centre crop.
    normalise: false leaves pixels in uint8, for `normalised` to turn into the same values where they are needed. Raises
    UserError for an interpolation that torchvision does not have.
    """
    if image.interpolation not in INTERPOLATIONS:
        hint = nearest(image.interpolation, INTERPOLATIONS)
        accepted = ", ".join(INTERPOLATIONS)
        raise UserError(f"backbone.interpolation={image.interpolation} is unknown{hint}; accepted: {accepted}")
    mode = INTERPOLATIONS[image.interpolation]
    steps: list[v2.Transform]
    if train and config.scale is not None:
        low, high = config.scale
        side = image.size / math.sqrt(low)  # of which the smallest crop has `size` pixels
        steps = [v2.RandomResizedCrop(image.size, scale=(low, high), interpolation=mode, antialias=True)]
    else:
        side = image.resize
        steps = [v2.Resize(image.resize, interpolation=mode, antialias=True), v2.CenterCrop(image.size)]
    if train and config.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(config.hflip))
    steps.append(v2.ToImage())
    if normalise:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(image.mean), list(image.std))]
    return Transform(v2.Compose(steps), at_least=math.ceil(2 * side))


def normalised(pixels: Tensor, image: ImageConfig) -> Tensor:
    """Returns uint8 pixels [B, 3, H, W] in float32, as a transform that ends in them would give them.

    Numbers instead of tensors of them need no copy to the device.
    """
    found = pixels.to(torch.float32).mul_(1 / 255)
    for channel, mean, std in zip(found.unbind(1), image.mean, image.std):
        channel.sub_(mean).div_(std)
    return found
