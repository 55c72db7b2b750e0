"""Photos as their transform leaves them, kept in a folder that all processes of a comparison share.

An image is a function of its file, the transform, the seed, the epoch and its index, whatever the method that sees it:
runs of a seed differ by their method and their learning rate alone, and decode, crop and scale the same images again
and again, for longer than a fast device trains.
"""

from __future__ import annotations

import functools
import math
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2a_cli.common.errors import UserError
from s2a_cli.data import batches
from s2a_cli.data.images import ImageFiles, Images
from s2a_cli.data.transforms import Transform


class Shared(batches._Samples):
    """Samples whose images, uint8 [3, size, size], are in `folder` once any process has made them."""

    def __init__(self, folder: Path, split: Images, transform: Transform, seed: int):
        super().__init__(split, transform, seed)
        self.folder, self.made_by = folder, repr(transform)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, Any] | UserError:
        if not isinstance(self.split, ImageFiles):  # others have names that another data set has, too
            return super().__getitem__(key)
        what = repr((self.split.name(key[1]), self.made_by, self.seed, key))
        name = blake2b(what.encode(), digest_size=16).hexdigest()
        path = self.folder / name[:2] / name
        if not path.exists():
            sample = super().__getitem__(key)
            if isinstance(sample, UserError) or sample[0].dtype != torch.uint8:
                return sample
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(f"{name}.{os.getpid()}")
            part.write_bytes(sample[0].numpy().tobytes())
            part.replace(path)  # files.atomic_write would wait for the disk, 60,000 times
        pixels = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        side = math.isqrt(len(pixels) // 3)
        return pixels.view(3, side, side), self.split.target(key[1])


def share(folder: Path) -> None:
    """Lets the loaders of this process find images in `folder`, and leave there those that they make."""
    batches._Samples = functools.partial(Shared, folder)
