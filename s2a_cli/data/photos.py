"""Finds photos without labels, and decodes any number of them in bounded memory."""

from __future__ import annotations

import glob
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there, reason
from s2a_cli.common.text import one_line, printable
from s2a_cli.config.paths import missing_photos
from s2a_cli.data.images import EXTENSIONS, open_rgb
from s2a_cli.data.layout import hidden
from s2a_cli.data.transforms import Transform

AHEAD = 64  # photos that are decoded before they are asked for, at most
THUMBNAIL = 200  # pixels of the longer side


@dataclass(frozen=True)
class Photo:
    """A photo as a model takes it: pixels [3, H, W], or why it can't be read."""

    path: Path
    pixels: Tensor | None
    trouble: str = ""
    thumbnail: bytes = b""  # a JPEG, where it was asked for


def find(words: Sequence[str]) -> list[Path]:
    """Returns the photos that words name: files, folders with all below them, and patterns such as 'cats/*.jpg'.

    Raises UserError for a word that names none.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            photos = list(_below(path))
            accepted = f"accepted endings: {', '.join(EXTENSIONS)}"
            if not photos:
                raise UserError(f"images={printable(word)}: no photo in this folder; {accepted}")
        elif is_there(path):
            photos = [path]
        else:
            photos = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
            if not photos:
                raise UserError(missing_photos(word))
        found += photos
    return list(dict.fromkeys(found))


def _below(folder: Path) -> Iterator[Path]:
    """Yields the photos below a folder, sorted folder by folder; hidden ones are passed over.

    Links to folders are followed, each folder once.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"images={printable(folder)}: {printable(error.filename)} can't be read ({reason(error)})")

    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        again = real in seen
        seen.add(real)
        return not again

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not hidden(name) and is_new(os.path.join(place, name))]
        yield from (
            Path(place, name) for name in sorted(files) if name.lower().endswith(EXTENSIONS) and not hidden(name)
        )


def read(
    paths: Iterable[Path], transform: Transform, workers: int | None = None, thumbnails: bool = False
) -> Iterator[Photo]:
    """Yields each photo, decoded on threads ahead of its turn; one that can't be read comes with the reason.

    workers: the number of threads, one at least; None: one a core.
    """

    def decode(path: Path) -> Photo:
        try:
            image = open_rgb(path, transform.at_least)
        except Exception as error:  # on damaged bytes decoders raise nearly anything
            return Photo(path, None, one_line(error))
        return Photo(path, transform(image), thumbnail=thumbnail(image) if thumbnails else b"")

    waiting: deque[Future[Photo]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count() or 1 if workers is None else max(1, workers))
    try:
        for path in paths:
            waiting.append(pool.submit(decode, path))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def thumbnail(image: Image.Image) -> bytes:
    """Returns a small JPEG of an RGB image, at most THUMBNAIL pixels in width and height."""
    small, data = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(data, "JPEG", quality=80)
    return data.getvalue()
