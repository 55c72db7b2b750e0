"""Reads data sets: from the settings of `dataset=` to splits of labelled images.

A data set is a reader (a function from its settings and its folder to a `Source`) in a file of `data/sources/`, and a
file in `conf/dataset/`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed, nearest, utf8
from s2a_cli.config.checks import domain_problems
from s2a_cli.config.paths import missing_root
from s2a_cli.config.schema import DOMAINS, DatasetConfig
from s2a_cli.config.settings import rule_of
from s2a_cli.data import sources
from s2a_cli.data.balance import class_weights, image_weights
from s2a_cli.data.batches import Loader, loader, mix
from s2a_cli.data.images import Images
from s2a_cli.data.source import Source
from s2a_cli.data.sources import folder
from s2a_cli.data.splits import few_shots, hold_out, hold_out_groups, share
from s2a_cli.data.summary import Splits, describe, majority
from s2a_cli.data.transforms import ImageConfig, Transform, build_transform, normalised

__all__ = [
    "DATASETS",
    "ImageConfig",
    "Images",
    "Loader",
    "Splits",
    "Transform",
    "build_transform",
    "class_weights",
    "describe",
    "image_weights",
    "load",
    "loader",
    "majority",
    "mix",
    "normalised",
    "problems",
    "read",
    "title",
]

DATASETS: dict[str, Callable[[DatasetConfig, Path], Source]] = {
    name: reader
    for module in pkgutil.iter_modules(sources.__path__)
    for name, reader in importlib.import_module(f"{sources.__name__}.{module.name}").READERS.items()
}


OWN = ("folder", "table")  # the user's own images
FOR = {  # setting -> the data sets that it is for
    **dict.fromkeys(("on_corrupt", "hold_out"), OWN),
    **dict.fromkeys(("layout", "test_root"), ("folder",)),
    **dict.fromkeys(("file", "image_column", "label_column", "class_columns"), ("table",)),
    **dict.fromkeys(("split_column", "separator", "multi_label"), ("table",)),
    **dict.fromkeys(("domain", "test_domain"), ("domainnet", "folder")),
}


def load(config: DatasetConfig) -> Splits:
    """Reads a data set, after a download if need be, and splits it. Raises UserError for bad settings and bad data.

    Official splits are kept. Without a test split, `test_fraction` of the images becomes one. Without a validation
    split, `val_fraction` of the training images becomes one. Then `shots` or `fraction` thins out the training images.
    All are drawn class by class with `split_seed`; images of one group of `hold_out` stay together.
    """
    source = read(config)
    train, val, test, seed = source.train, source.val, source.test, config.split_seed
    if test is None:
        train, test = _split(train, config.test_fraction, seed, "test")
    if val is None:
        train, val = _split(train, config.val_fraction, seed, "val")
    whole = len(train)
    if config.shots is not None:
        train = train.subset(few_shots(train.labels, config.shots, seed, source.classes))
    if config.fraction is not None:
        train = train.subset(share(train.labels, config.fraction, seed))
    left_out = list(source.left_out)
    if (thinned := whole - len(train)) > 0:
        setting = f"shots={config.shots}" if config.shots is not None else f"fraction={config.fraction}"
        left_out.append(f"{thinned} training images by dataset.{setting}")
    return Splits(title(config), train, val, test, source.classes, source.revision, left_out, source.notes, source.same)


def read(config: DatasetConfig, to_train: bool = True) -> Source:
    """Reads a data set as it is published, after a download if need be. Raises UserError as `load` does.

    to_train: false also takes a folder of one class, on which a model can be tested.
    """
    if found := problems(config):
        raise UserError("\n".join(found))
    if config.name == "folder" and not to_train:
        return folder.read(config, data_folder(config), least=1)
    return DATASETS[config.name](config, data_folder(config))


def data_folder(config: DatasetConfig) -> Path:
    """Returns the folder of a data set's files: its name below `root`, else below $S2A_DATA, else below ~/.cache/s2a.

    For the user's own images, where `root` is the data itself, it is the folder of the cache. Raises UserError for a
    home folder that there is not.
    """
    given = None if config.name in OWN else config.root
    root = given or os.environ.get("S2A_DATA") or "~/.cache/s2a"
    try:
        return Path(root).expanduser() / config.name
    except RuntimeError:  # the user after ~ has no home, or does not exist
        raise UserError(f"{root}: there is no such home folder; set S2A_DATA to a folder for data, or HOME") from None


def _real(path: str) -> Path:
    """Returns a path without links; Path.resolve() raises for a link to itself."""
    return Path(os.path.realpath(Path(path).expanduser()))


def title(config: DatasetConfig) -> str:
    """Returns the name in tables and paths: pets, domainnet-real-to-sketch, that of a folder, or birds-labels.

    It is never empty, and can be written in UTF-8.
    """
    named = config.name
    if config.name == "table" and config.file:
        table = _real(config.file)
        return utf8(f"{table.parent.name}-{table.stem}".lstrip("-"))
    if config.name == "folder" and config.root:
        named = utf8(_real(config.root).name.lstrip(".").split(".")[0]) or config.name
        if config.test_domain and not config.domain:
            return f"{named}-to-{config.test_domain}"
    domains = [domain for domain in (config.domain, config.test_domain) if domain]
    return f"{named}-{'-to-'.join(domains)}" if domains else named


def problems(config: DatasetConfig) -> list[str]:
    """Returns what is wrong with the settings, a line each. The data itself is not read."""
    if config.name not in DATASETS:
        return [f"dataset={config.name}: expected one of {', '.join(DATASETS)}{nearest(config.name, DATASETS)}"]
    found = []
    for key in (field.name for field in fields(DatasetConfig)):
        value, rule = getattr(config, key), rule_of(DatasetConfig, key)
        if rule and value is not None and not rule.test(value):
            found.append(rule.problem(f"dataset.{key}", value))
    if config.shots is not None and config.fraction is not None:
        found.append("dataset.shots and dataset.fraction exclude each other: set one to null")
    found += missing_root(config.name, config.root, config.file)
    for key, names in FOR.items():
        if config.name not in names and getattr(config, key) not in (None, "stop"):
            found.append(f"dataset.{key} is for {' and '.join(f'dataset={name}' for name in names)}, not {config.name}")
    if config.label_column and config.class_columns:
        found.append("dataset.label_column and dataset.class_columns exclude each other: set one to null")
    if config.layout in ("splits", "classes") and (config.domain or config.test_domain):
        found.append(f"dataset.layout={config.layout} has no domains: leave it out with dataset.domain or test_domain")
    if config.test_root and config.test_domain:
        found.append("dataset.test_root and dataset.test_domain exclude each other: set one to null")
    if config.name == "folder" and config.hold_out and config.hold_out != "parent":
        try:
            re.compile(config.hold_out)
        except re.error as error:
            found.append(f"dataset.hold_out={config.hold_out}: is no regular expression ({error}); or say parent")
    if config.name == "domainnet" and config.domain is None:
        found.append(f"dataset=domainnet needs dataset.domain=: one of {', '.join(DOMAINS)}")
    return [*found, *domain_problems(config.name, config.domain, config.test_domain).values()]


def _split(images: Images, fraction: float, seed: int, purpose: str) -> tuple[Images, Images]:
    """Splits images into (kept, held out). Raises UserError where no class has two images, or two groups of them."""
    if images.groups is None and images.classes is None:
        kept, held = hold_out(images.labels, fraction, seed, purpose)
    else:
        several = images.labels if images.classes is not None else [(label,) for label in images.labels]
        kept, held = hold_out_groups(several, images.groups, fraction, seed, purpose)
    if images.groups and not (held and kept):
        raise UserError(
            f"dataset.hold_out: no class has the two groups of images that a {purpose} split needs; left are"
            f" {listed(sorted(set(images.groups)), 3)}: give smaller groups, or a {purpose} split of your own"
        )
    if not held:
        raise UserError(
            f"no class has the two images that a {purpose} split needs; add images, or give a {purpose} folder"
        )
    return images.subset(kept), images.subset(held)
