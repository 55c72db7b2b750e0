"""The user's own images: one folder a class, in train/[val/]test/ trees or in one tree that is split by seed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from s2a_cli.config import DatasetConfig
from s2a_cli.data.archives import SUFFIXES, extract_once
from s2a_cli.data.files import sha256
from s2a_cli.data.images import ImageFiles
from s2a_cli.data.integrity import examine
from s2a_cli.data.source import Source
from s2a_cli.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def read(config: DatasetConfig, cache: Path) -> Source:
    """Reads `config.root`, a folder or an archive of one, which is extracted into `cache` once.

    Every image is decoded once, up front. Raises UserError for a class without an image, for a class that is not in
    train, and, unless config.on_corrupt is "skip", for an image that cannot be decoded.
    """
    root = _open_root(Path(config.root).expanduser(), cache)
    trees = _trees(root)
    found = {split: _class_files(root, tree) for split, tree in trees.items()}
    classes = sorted(found["train"])
    for split, by_class in found.items():
        if extra := sorted(set(by_class) - set(classes)):
            raise UserError(f"{root / trees[split]} has classes that train does not have: {_listed(extra)}")
    if len(classes) < 2:
        raise UserError(f"{root / trees['train']} has one class folder, {classes[0]!r}; two or more are needed")

    files = sorted(file for by_class in found.values() for files in by_class.values() for file in files)
    report = examine(root, files, cache / "checked")
    if report.damaged and config.on_corrupt == "stop":
        (first, reason), *more = report.damaged.items()
        others = f", and {len(more)} more: {_listed([file for file, _ in more])}" if more else ""
        raise UserError(
            f"{root / first} is not a readable image ({reason}){others}; "
            "mend or remove it, or leave such images out with dataset.on_corrupt=skip"
        )
    for file, reason in report.damaged.items():
        log.warning("left out: %s is not a readable image (%s)", root / file, reason)

    splits = {split: _images(root, found[split], classes, report.damaged) for split in found}
    return Source(splits["train"], splits.get("val"), splits.get("test"), classes, report.revision)


def _open_root(root: Path, cache: Path) -> Path:
    if root.is_dir():
        return root
    if not root.exists():
        raise UserError(f"dataset.root={root} does not exist; give a folder of images, or an archive of one")
    if not root.name.lower().endswith(SUFFIXES):
        raise UserError(f"dataset.root={root} is neither a folder nor an archive ({', '.join(SUFFIXES)})")
    tree = cache / f"{root.name.split('.')[0]}-{sha256(root)[:16]}"
    if not tree.exists():
        extract_once(root, tree)
    inside = _folders(tree)
    wrapped = len(inside) == 1 and inside[0] not in SPLITS and _folders(tree / inside[0])
    return tree / inside[0] if wrapped else tree  # archives often hold one folder with everything in it


def _trees(root: Path) -> dict[str, str]:
    """Split -> folder under `root`; {"train": ""} where the whole of `root` is one tree."""
    names = _folders(root)
    trees = {split: name for split, accepted in SPLITS.items() for name in names if name in accepted}
    if not trees:
        return {"train": ""}
    if "train" not in trees or "test" not in trees:
        missing = "train" if "train" not in trees else "test"
        raise UserError(
            f"{root} has {_listed(sorted(trees.values()))} but no {missing}; give train, test and perhaps val, "
            "or one tree of class folders, which is split by dataset.test_fraction and dataset.val_fraction"
        )
    return trees


def _class_files(root: Path, tree: str) -> dict[str, list[str]]:
    """Class -> its image files as sorted paths relative to `root`, nested folders included."""
    top = root / tree
    by_class = {name: _image_files(root, top / name) for name in _folders(top)}
    if not by_class:
        raise UserError(f"{top} has no class folders; put the images of each class into a folder named after it")
    if empty := [name for name, files in by_class.items() if not files]:
        accepted = ", ".join(EXTENSIONS)
        raise UserError(f"no image in {_listed([str(top / name) for name in empty])}; accepted: {accepted}")
    return by_class


def _image_files(root: Path, top: Path) -> list[str]:
    found = []
    for folder, inner, names in os.walk(top, followlinks=True):
        inner[:] = [name for name in inner if not _hidden(name)]
        found += [
            Path(folder, name).relative_to(root).as_posix()
            for name in names
            if not _hidden(name) and name.lower().endswith(EXTENSIONS)
        ]
    return sorted(found)


def _images(root: Path, by_class: dict[str, list[str]], classes: list[str], damaged: dict[str, str]) -> ImageFiles:
    files, labels = [], []
    for name, of_class in by_class.items():
        good = [file for file in of_class if file not in damaged]
        if not good:
            raise UserError(f"no readable image in class {name!r} of {root}: all {len(of_class)} are damaged")
        files += good
        labels += [classes.index(name)] * len(good)
    return ImageFiles(root, files, labels)


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # the latter is what a Mac adds to a zip


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
