"""Defines what a reader of a data set returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256

from s2a_cli.data.download import RemoteFile
from s2a_cli.data.images import Images


@dataclass
class Source:
    """A data set as published. A split that it does not have is None, and is split off `train` later."""

    train: Images
    val: Images | None
    test: Images | None
    classes: list[str]
    revision: str  # a short hash that changes when the data does
    left_out: list[str] = field(default_factory=list)  # what of the folder is not read, and why: a phrase each
    notes: list[str] = field(default_factory=list)  # what looks wrong with the images: a sentence each
    same: list[list[str]] = field(default_factory=list)  # groups of files (of ImageFiles) with the same bytes


def revision_of(*files: RemoteFile) -> str:
    """Returns the revision of data that consists of these files: 12 hex digits of a hash of their checksums."""
    return sha256(" ".join(file.sha256 for file in files).encode()).hexdigest()[:12]
