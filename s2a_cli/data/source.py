"""What a reader of a data set returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256

from s2a_cli.data.download import RemoteFile
from s2a_cli.data.images import Images


@dataclass
class Source:
    """A data set as published: official splits where there are any, else None, to be split off `train`."""

    train: Images
    val: Images | None
    test: Images | None
    classes: list[str]
    revision: str  # a short hash that changes when the data does
    left_out: list[str] = field(default_factory=list)  # what of the folder is not read, and why, a phrase each
    notes: list[str] = field(default_factory=list)  # what looks wrong with the images
    same: list[list[str]] = field(default_factory=list)  # groups of files (of ImageFiles) with the same bytes


def revision_of(*files: RemoteFile) -> str:
    """The revision of data that consists of these files, which are verified against their checksums."""
    return sha256(" ".join(file.sha256 for file in files).encode()).hexdigest()[:12]
