"""Reads scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels (UCI, Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.images import ImageArray
from s2a_cli.data.source import Source


def read(config: DatasetConfig, folder: Path) -> Source:
    """Returns the digits, which ship with scikit-learn: nothing is downloaded."""
    spec = find_spec("sklearn")  # to import it takes longer than to train on the digits
    assert spec is not None and spec.origin is not None, "scikit-learn is a dependency"
    package = Path(spec.origin).parent
    rows = np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",")  # 64 values and the label
    grey = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # 0 to 16 -> 0 to 255
    labels = rows[:, -1].astype(int).tolist()
    revision = sha256(grey.tobytes() + bytes(labels)).hexdigest()[:12]
    return Source(ImageArray(np.repeat(grey[..., None], 3, axis=-1), labels), None, None, list("0123456789"), revision)
