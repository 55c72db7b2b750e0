"""Tells whether the folders of the user's data are splits or classes. Where both are possible, the user must say."""

from __future__ import annotations

import os
import re
from itertools import accumulate
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import reason
from s2a_cli.common.text import listed, nearest, printable

# split: the names of its folder, in upper or lower case
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# split: words in the names of folders that seem to mean it
WORDS = dict(SPLITS) | {"val": (*SPLITS["val"], "dev"), "test": (*SPLITS["test"], "eval")}
SPLITS_OR_CLASSES = "say dataset.layout=splits or dataset.layout=classes"


def domain_folders(root: Path, domain: str | None, test_domain: str | None) -> dict[str, list[str]]:
    """Returns split -> its folders under `root`, each of which holds class folders.

    A domain is a folder of class folders, or of splits of these. train: `domain`, or all but `test_domain`. test:
    `test_domain`, of which its own test split where it has one; without one, the test splits of the others. Raises
    UserError for a domain that is not there, and where some domains have splits and others do not.
    """
    names = folders(root)
    for setting, name in (("domain", domain), ("test_domain", test_domain)):
        if name is not None and name not in names:
            raise UserError(
                f"dataset.{setting}={printable(name)}: {printable(root)} has no such folder, but"
                f" {listed(names, 12) or 'none'}{nearest(name, names)}"
            )
    trained = [domain] if domain else [name for name in names if name != test_domain]
    if not trained or domain == test_domain is not None:
        raise UserError(f"dataset.test_domain={printable(test_domain)} leaves no domain to train on")
    splits = {name: _splits_within(root, name) for name in (*trained, *([test_domain] if test_domain else []))}
    if odd := [name for name, found in splits.items() if found.keys() != splits[trained[0]].keys()]:
        raise UserError(
            f"{printable(root)}: {printable(odd[0])} has {listed(splits[odd[0]])}, and {printable(trained[0])}"
            f" {listed(splits[trained[0]])}: give every domain the same splits"
        )
    trees = {split: [splits[name][split] for name in trained] for split in splits[trained[0]]}
    if test_domain:
        trees["test"] = [splits[test_domain].get("test", splits[test_domain]["train"])]
    return trees


def _splits_within(root: Path, domain: str) -> dict[str, str]:
    """Returns split -> its folder under `root` of one domain; {"train": domain} where it is a folder of classes."""
    if not any(map(names_split, folders(root / domain))):
        return {"train": domain}
    return {split: f"{domain}/{tree}" for split, tree in split_folders(root / domain, None).items()}


def split_folders(root: Path, layout: str | None, test_elsewhere: bool = False) -> dict[str, str]:
    """Returns split -> its folder under `root`; {"train": ""} where all of `root` is one tree of classes.

    layout: "splits" or "classes"; None: what the names of the folders say. test_elsewhere: a test folder is not needed,
    and is left out. Raises UserError where these could mean either.
    """
    names = folders(root)
    if layout == "classes":
        return {"train": ""}
    found = {split: [name for name in names if name.lower() in accepted] for split, accepted in SPLITS.items()}
    found = {split: of_split for split, of_split in found.items() if of_split}
    if not found and layout is None:
        _refuse_hidden_splits(root, names)
        return {"train": ""}
    as_classes = f"if these are {len(names)} classes, say dataset.layout=classes"
    for split, of_split in found.items():
        if len(of_split) > 1:
            raise UserError(
                f"{printable(root)} has {' and '.join(of_split)}, both of which name the {split} split; keep one, or,"
                f" {as_classes}"
            )
    if test_elsewhere:
        found.pop("test", None)
    if missing := [split for split in ("train", *([] if test_elsewhere else ["test"])) if split not in found]:
        has = listed([name for of_split in found.values() for name in of_split] or names)
        raise UserError(
            f"{printable(root)} has {has} but no {' and no '.join(missing)}: as splits, give it the folders train, test"
            f" and perhaps val; {as_classes}: one tree of class folders, which is split by dataset.test_fraction and"
            " dataset.val_fraction"
        )
    trees = {split: of_split[0] for split, of_split in found.items()}
    for split, name in trees.items():
        if not folders(root / name):
            raise UserError(
                f"{printable(root / name)} has no class folders; put the images of each class into one named after it;"
                f" {as_classes}"
            )
        if (target := os.path.realpath(root / name)) != str(root.resolve() / name) and within(
            target, os.path.realpath(root)
        ):
            raise UserError(
                f"{printable(root / name)} is a link to {printable(target)}: the {split} split would have the images of"
                " another"
            )
    return trees


def _refuse_hidden_splits(root: Path, names: list[str]) -> None:
    """Raises UserError where folders that would be taken for classes look like splits."""
    meant = {name: meant_split(name) for name in names}
    both = f"{SPLITS_OR_CLASSES}; folders of splits are to be called train, test and perhaps val"
    if all(meant.values()) and len(set(meant.values())) > 1:
        raise UserError(
            f"{printable(root)} has {listed(names)}, which look like splits, but would be read as {len(names)} classes:"
            f" {both}"
        )
    if len(names) < 2:
        return
    common: set[str] = set()
    for common in accumulate((set(folders(root / name)) for name in names), set.intersection):
        if len(common) < 2:
            return
    if all(_has_files(root / name) for name in names):
        return  # classes with folders in them: as splits, these images would have no class
    raise UserError(
        f"{printable(root)} has {listed(names, 3)}, all of which hold the folders {listed(sorted(common), 3)}: "
        f"splits or domains of {len(common)} classes, or {len(names)} classes? {both}; for domains say"
        " dataset.layout=domains"
    )


def meant_split(name: str) -> str | None:
    """Returns the split that a name such as training_set, test2017 or valData seems to mean, or None."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = [re.sub("(set|data|images|split)$", "", word) for word in re.findall("[a-z]+", spaced)]
    return next((split for split, meant in WORDS.items() if any(word in meant for word in words)), None)


def class_folders(root: Path, layout: str | None = None) -> int:
    """Returns how many classes a folder has by the names of its folders alone, also where reading it would fail."""
    names = folders(root)
    if layout == "domains":
        trees = [_splits_within(root, domain)["train"] for domain in names]
        return len({name for tree in trees for name in folders(root / tree)})
    trees = [] if layout == "classes" else [name for name in names if name.lower() in SPLITS["train"]]
    return len(folders(root / trees[0])) if trees else len(names)


def folders(path: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, without hidden ones. Raises UserError where it can't."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not hidden(entry.name) and is_folder(entry))
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({reason(error)})") from error


def _has_files(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(not hidden(entry.name) and not is_folder(entry) for entry in entries)


def is_folder(entry: os.DirEntry) -> bool:
    """Tells whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def names_split(name: str) -> bool:
    """Tells whether a folder of this name holds a split."""
    return any(name.lower() in accepted for accepted in SPLITS.values())


def hidden(name: str) -> bool:
    """Tells whether a file or folder of this name is passed over."""
    return name.startswith(".") or name == "__MACOSX"  # the latter is what a Mac adds to a zip


def within(path: str, folder: str) -> bool:
    """Tells whether one of two real paths lies in the other, or is the other."""
    return os.path.commonpath([path, folder]) in (path, folder)
