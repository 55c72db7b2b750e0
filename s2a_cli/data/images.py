"""Holds images with labels, by index: the one form in which every data set reaches the rest of the program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import open_regular
from s2a_cli.common.text import one_line, printable

try:
    from PIL.AvifImagePlugin import SUPPORTED as AVIF
except ImportError:  # Pillow before 11.3
    AVIF = False

HEIF = find_spec("pillow_heif") is not None
# Accepted by content, as many a .jpg of a real collection is a PNG. Pillow knows more formats, some of which start
# other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", *(["AVIF"] if AVIF else []))
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    *([".avif"] if AVIF else []), *([".heic", ".heif"] if HEIF else []),
)  # fmt: skip
INSTALL = {".avif": "Pillow 11.3 or newer", ".heic": "s2a[heic]", ".heif": "s2a[heic]"}
FLOAT_RANGES = ((0, 1), (-1, 1), (0, 255), (0, 65535))  # of (black, white) in images of floats
MIN_SAMPLE = 280, 340  # tags of a TIFF: MinSampleValue, SMinSampleValue
MAX_SAMPLE = 281, 341  # MaxSampleValue, SMaxSampleValue


class Images:
    """A map-style data set of (RGB PIL image, label).

    `labels[i]` is the class of image i, an index into the class names of its `Splits`. Where an image may have several
    labels, `classes` is the number of class names and `labels[i]` a tuple of such indices, which may be empty.
    `groups[i]` names what image i is of, such as one animal; None where that is not known.
    """

    labels: list[Any]
    classes: int | None = None
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return self.image(index), self.labels[index]

    def target(self, index: int) -> int | np.ndarray:
        """Returns what a loss compares with: the label, or float32 [classes] of 0 and 1 where there may be several."""
        if self.classes is None:
            return self.labels[index]
        return np.isin(np.arange(self.classes), self.labels[index]).astype(np.float32)

    def present(self) -> set[int]:
        """Returns the labels that occur."""
        return set(self.labels) if self.classes is None else {label for several in self.labels for label in several}

    def counts(self, classes: int) -> np.ndarray:
        """Returns the number of images of each class, [classes]; an image of several labels counts for each."""
        labels = self.labels if self.classes is None else [label for several in self.labels for label in several]
        return np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Returns image `index` in RGB. It may be reduced as long as its shorter side keeps `at_least` pixels."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Returns what to call image `index` in a message."""
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Images:
        """Returns the images `indices`, in that order."""
        raise NotImplementedError


class ImageFiles(Images):
    """Image files under `root`; `files` are relative paths with forward slashes, or absolute ones."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Sequence[Any],
        classes: int | None = None,
        groups: Sequence[str] | None = None,
    ):
        self.root, self.files, self.labels, self.classes = root, list(files), list(labels), classes
        self.groups = None if groups is None else list(groups)

    def image(self, index, at_least=None):
        path = self.root / self.files[index]
        try:
            return open_rgb(path, at_least)
        except Exception as error:  # on damaged bytes decoders raise nearly anything
            raise UserError(f"{printable(path)} is not a readable image ({one_line(error)})") from error

    def name(self, index):
        return str(self.root / self.files[index])

    def subset(self, indices):
        groups = None if self.groups is None else [self.groups[i] for i in indices]
        files, labels = [self.files[i] for i in indices], [self.labels[i] for i in indices]
        return ImageFiles(self.root, files, labels, self.classes, groups)


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
    """Decodes a file to RGB.

    The image is turned upright by its EXIF tag, transparency is put over white, and grey values of more than 8 bits are
    scaled to 8 bits. With `at_least`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side
    keeps that many pixels. Raises what Pillow raises for a file that is missing, damaged or truncated, NotRegular for a
    pipe or a device, ValueError for a format that is not in FORMATS.
    """
    try:
        with open_regular(path) as stream, Image.open(stream, formats=_formats(path)) as image:
            # draft() also takes a coarser inverse DCT, which shows unless the image is reduced
            if at_least and min(image.size) >= 2 * at_least:
                image.draft("RGB", (at_least, at_least))
            image.load()
            stated = _stated_range(image)
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"its content is none of {', '.join(_formats(path))}") from None
    if image.mode == "F" or image.mode.startswith("I"):  # convert("RGB") would clip these instead of scaling them
        image = Image.fromarray(_eight_bits(np.asarray(image), stated))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _formats(path: Path) -> tuple[str, ...]:
    return (*FORMATS, _heif()) if HEIF and path.suffix.lower() in (".heic", ".heif") else FORMATS


@cache
def _heif() -> str:
    import pillow_heif  # pyright: ignore[reportMissingImports]  # optional

    pillow_heif.register_heif_opener()
    return "HEIF"


def _stated_range(image: Image.Image) -> tuple[float, float] | None:
    """Returns the values that a TIFF says are black and white; None where it does not say."""
    tags = getattr(image, "tag_v2", {})
    low, high = ([tags[tag] for tag in pair if tag in tags] for pair in (MIN_SAMPLE, MAX_SAMPLE))
    if not high:
        return None
    try:
        first = [float(value[0] if isinstance(value, tuple) else value) for value in (*high, *(low or [0.0]))]
    except (TypeError, ValueError, IndexError):  # tags of an odd kind
        return None
    return (first[-1], first[0]) if np.isfinite(first).all() and first[0] > first[-1] else None


def _eight_bits(values: np.ndarray, stated: tuple[float, float] | None) -> np.ndarray:
    """Scales grey values [H, W], floats or integers of 16 or 32 bits, to uint8.

    Black and white are those that the file states, if all values lie between them. Else they are the first of
    FLOAT_RANGES that has all values, for integers 0 and 65535. Where values lie beyond, such as Hounsfield units, they
    are the smallest and the largest value.
    """
    whole = np.issubdtype(values.dtype, np.integer)
    finite = values if whole else values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    ranges = [*([stated] if stated else []), *([(0, 65535)] if whole else FLOAT_RANGES)]
    low, high = next(((a, b) for a, b in ranges if a <= least and most <= b), (least, most))
    if whole and (low, high) == (0, 65535):
        return (values >> 8).astype(np.uint8)
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * (
        255 / ((high - low) or 1)
    )
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)
