"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels (UCI, Alpaydin and Kaynak, 1998); no network."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from s2a_cli.config import DatasetConfig
from s2a_cli.data.images import ImageArray
from s2a_cli.data.source import Source


def read(config: DatasetConfig, folder: Path) -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0 to 16 -> 0 to 255
    labels = bunch.target.tolist()
    revision = sha256(grey.tobytes() + bytes(labels)).hexdigest()[:12]
    return Source(ImageArray(np.repeat(grey[..., None], 3, axis=-1), labels), None, None, list("0123456789"), revision)
