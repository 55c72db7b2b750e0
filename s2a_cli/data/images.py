"""Images with labels, by index: the one form in which every data set reaches the rest of the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from s2a_cli.data.files import one_line
from s2a_cli.errors import UserError


class Images:
    """A map-style data set of (RGB PIL image, label).

    `labels[i]` is the class of image i, an index into the class names of its `Splits`.
    """

    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self.labels[index]

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Image `index` in RGB. A shorter side of `at_least` pixels will do: it may be reduced to that."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Images:
        """The images `indices`, in that order."""
        raise NotImplementedError


class ImageFiles(Images):
    """Image files under `root`; `files` are relative paths with forward slashes."""

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]):
        self.root, self.files, self.labels = root, list(files), list(labels)

    def image(self, index, at_least=None):
        path = self.root / self.files[index]
        try:
            return open_rgb(path, at_least)
        except Exception as error:  # on damaged bytes decoders raise nearly anything
            raise UserError(f"{path} is not a readable image ({one_line(error)})") from error

    def name(self, index):
        return str(self.root / self.files[index])

    def subset(self, indices):
        return ImageFiles(self.root, [self.files[i] for i in indices], [self.labels[i] for i in indices])


class ImageArray(Images):
    """Images in memory: `pixels` is [N, H, W, 3] uint8; `rows` picks some of them without a copy."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], rows: Sequence[int] | None = None):
        self.pixels, self.labels = pixels, list(labels)
        self.rows = list(range(len(pixels))) if rows is None else list(rows)

    def image(self, index, at_least=None):
        return Image.fromarray(self.pixels[self.rows[index]])

    def name(self, index):
        return f"image {self.rows[index]}"

    def subset(self, indices):
        return ImageArray(self.pixels, [self.labels[i] for i in indices], [self.rows[i] for i in indices])


def open_rgb(path: Path, at_least: int | None = None) -> Image.Image:
    """Decodes a file to RGB: turned upright by its EXIF tag, transparency over white, 16-bit grey scaled to 8.

    With `at_least`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side stays at least
    that many pixels. Raises what Pillow raises for a file that is missing, damaged or truncated.
    """
    with Image.open(path) as image:
        # draft() also switches to a coarser inverse DCT, which only a real reduction hides
        if at_least and min(image.size) >= 2 * at_least:
            image.draft("RGB", (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert("RGB") would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
