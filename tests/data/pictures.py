"""Makes small images, and folders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from s2a_cli.config.schema import DatasetConfig


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Returns a smooth image that differs for each seed and that JPEG keeps recognisable."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).convert(mode)


def save(path: Path, seed: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **options).save(path)
    return path


def tree(root: Path, classes=("cat", "dog"), images: int = 6, suffix: str = ".png", seed: int = 0) -> Path:
    """Makes a folder of class folders, each with so many images."""
    for label, name in enumerate(classes):
        for index in range(images):
            save(root / name / f"{index}{suffix}", seed + 100 * label + index)
    return root


def folder_config(root: Path, **settings) -> DatasetConfig:
    return DatasetConfig(name="folder", root=str(root), **settings)
