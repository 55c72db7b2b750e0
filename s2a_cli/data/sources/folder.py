"""Reads the user's own images: one folder a class, in trees of splits or domains, or in one tree."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import reason, sha256_of
from s2a_cli.common.text import counted, listed, printable, utf8
from s2a_cli.config.paths import missing_folder
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.archives import SUFFIXES, extract_once
from s2a_cli.data.images import EXTENSIONS, INSTALL, ImageFiles
from s2a_cli.data.integrity import Report, examine, merged
from s2a_cli.data.layout import domain_folders, folders, hidden, is_folder, names_split, split_folders, within
from s2a_cli.data.source import Source

LONGEST = 100  # characters of an archive's name in that of the folder that it is extracted to


def read(config: DatasetConfig, cache: Path, least: int = 2) -> Source:
    """Reads `config.root`, a folder or an archive of one, which is extracted into `cache` once.

    Decodes every image once. Raises UserError for fewer classes than `least`, for a class without an image, for a class
    that is not in train, and, unless config.on_corrupt is "skip", for an image that cannot be decoded.
    """
    assert config.root is not None, "data.problems asks for it"
    root = _open_root(Path(config.root).expanduser(), cache)
    by_domain = config.layout == "domains" or config.domain or config.test_domain
    if by_domain:
        trees = domain_folders(root, config.domain, config.test_domain)
    else:
        found = split_folders(root, config.layout, test_elsewhere=config.test_root is not None)
        trees = {split: [tree] for split, tree in found.items()}
    there = None
    if config.test_root:
        there = _open_root(Path(config.test_root).expanduser(), cache, "test_root").absolute()  # not below root
        _refuse_shared(root, trees, there)
    walk = _Walk(root)
    images = {split: _merged(_class_files(walk, tree) for tree in of_split) for split, of_split in trees.items()}
    reports = {root: _examine(root, images, config, cache)}
    left_out = [*walk.left_out(), *_outside(root, trees, "not asked for" if by_domain else "no split")]
    if there:
        test_walk = _Walk(there)
        elsewhere = {"test": _class_files(test_walk, "")}
        reports[there] = _examine(there, elsewhere, config, cache)
        left_out += [*test_walk.left_out(), *_outside(there, {"test": [""]}, "")]
        images["test"] = {name: [str(there / file) for file in files] for name, files in elsewhere["test"].items()}
        trees["test"] = [str(there)]
    report = merged(reports, root)
    classes = sorted(images["train"])
    for split, by_class in images.items():
        if extra := sorted(set(by_class) - set(classes)):
            where = listed([root / tree for tree in trees[split]])
            raise UserError(f"{where} has classes that train does not have: {listed(extra)}")
    if len(classes) < least:
        (only,), tree = classes, trees["train"][0]
        inner = folders(root / tree / only)
        hint = f"; is dataset.root={printable(root / only)} what you mean?" if not tree and inner[1:] else ""
        raise UserError(f"{printable(root / tree)} has one class folder, {only!r}; two or more are needed{hint}")
    splits = {split: _images(root, images[split], classes, report.damaged) for split in images}
    if config.hold_out:
        for split, of_split in splits.items():
            of_split.groups = groups_of(of_split.files, trees[split], config.hold_out)
        if all(of_split.groups == of_split.files for of_split in splits.values()):
            raise UserError(
                f"dataset.hold_out={config.hold_out}: names no group of images; the first is"
                f" {printable(splits['train'].files[0])}"
            )
    left_out += report.left_out()
    train, val, test = splits["train"], splits.get("val"), splits.get("test")
    return Source(train, val, test, classes, report.revision, left_out, report.notes(), report.same)


def _refuse_shared(root: Path, trees: dict[str, list[str]], there: Path) -> None:
    """Raises UserError where the images of dataset.test_root would be trained on, or those trained on be its."""
    for tree in (root / tree for split, of_split in trees.items() if split != "test" for tree in of_split):
        if within(os.path.realpath(there), os.path.realpath(tree)):
            raise UserError(
                f"dataset.test_root={printable(there)} and {printable(tree)}, whose folders are classes to train on,"
                " share images: give test_root a folder beside it, not in it"
            )


def _examine(root: Path, images: dict[str, dict[str, list[str]]], config: DatasetConfig, cache: Path) -> Report:
    files = sorted(file for by_class in images.values() for files in by_class.values() for file in files)
    report = examine(root, files, cache / "checked")
    if config.on_corrupt == "stop":
        report.refuse_damaged(root, extracted=cache in root.parents)
    return report


def _merged(found: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    """Returns class -> its files in all of several trees."""
    together: dict[str, list[str]] = {}
    for by_class in found:
        for name, files in by_class.items():
            together.setdefault(name, []).extend(files)
    return together


def groups_of(files: list[str], trees: list[str], hold_out: str) -> list[str]:
    """Returns for each file of a split what it is of; an image that no group is named for is one by itself.

    hold_out: "parent", the folder that a file lies in below that of its class, or a regular expression that is searched
    in its path below the folder of the split; its first group, or else all that it matches, is the name.
    """
    found = []
    for file in files:
        tree = next((tree for tree in trees if tree and file.startswith(f"{tree}/")), "")
        below = file.removeprefix(tree).lstrip("/")
        if hold_out == "parent":
            folder = below.rpartition("/")[0]
            found.append(folder if "/" in folder else file)
        else:
            match = re.search(hold_out, below)
            found.append(match[match.re.groups and 1] or file if match else file)
    return found


def _open_root(root: Path, cache: Path, setting: str = "root") -> Path:
    """Returns the folder of images: `root`, or what the archive `root` holds. Raises UserError where it is neither."""
    try:
        if root.is_dir():
            return root
        there = root.exists()
    except OSError as error:  # a folder above that may not be entered, a name too long
        raise UserError(f"dataset.{setting}={printable(root)} cannot be read ({reason(error)})") from error
    if not there:
        raise UserError(missing_folder(setting, root))
    if not root.name.lower().endswith(SUFFIXES):
        raise UserError(
            f"dataset.{setting}={printable(root)} is neither a folder nor an archive ({', '.join(SUFFIXES)})"
        )
    digest = sha256_of(root)
    tree = cache / f"{root.name.split('.')[0][:LONGEST]}-{digest[:16]}"
    extract_once(root, tree, digest)
    inside = folders(tree)
    wrapped = len(inside) == 1 and not names_split(inside[0]) and folders(tree / inside[0])
    return tree / inside[0] if wrapped else tree  # archives often hold one folder with everything in it


class _Walk:
    """Lists the files of classes, and counts what it passes over. Visits a folder once, whatever links to it."""

    def __init__(self, root: Path):
        self.root, self.real = root, os.path.realpath(root)
        self.seen: dict[tuple[int, int], str] = {}  # device and inode of a folder: the class folder it was visited from
        self.endings: Counter[str] = Counter()  # of files that are no images
        self.strays: list[str] = []  # links out of their class

    def images(self, top: str) -> list[str]:
        """Returns the image files below a class folder, as sorted paths relative to the root.

        Links are followed unless they lead to other classes. Raises UserError for a folder that can't be read, and for
        one that two class folders lead to.
        """
        own = os.path.realpath(self.root / top)
        if own != os.path.join(self.real, top) and self._astray(own, None):
            raise UserError(
                f"{printable(self.root / top)} is a link to {printable(own)}: its images would be in two classes or"
                " splits"
            )
        found, left = [], [top]
        while left:
            folder = left.pop()
            try:
                if self._visited(folder, top):
                    continue
                with os.scandir(self.root / folder) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        path = f"{folder}/{entry.name}"
                        if hidden(entry.name):
                            continue
                        if entry.is_symlink() and self._astray(os.path.realpath(entry.path), own):
                            self.strays.append(path)
                        elif is_folder(entry):
                            left.append(path)
                        elif entry.name.lower().endswith(EXTENSIONS):
                            found.append(path)
                        else:
                            self.endings[os.path.splitext(entry.name)[1].lower()] += 1
            except OSError as error:
                raise UserError(f"{printable(self.root / folder)} cannot be read ({reason(error)})") from error
        return sorted(found)

    def _astray(self, target: str, own: str | None) -> bool:
        """Tells whether a link out of the class `own` leads to another part of the data, or to a folder around it."""
        inside = own is not None and os.path.commonpath([target, own]) == own
        return within(target, self.real) and not inside

    def _visited(self, folder: str, top: str) -> bool:
        """Tells whether a folder was visited before, and notes it. Raises UserError where another class has it."""
        status = os.stat(self.root / folder)
        key = status.st_dev, status.st_ino
        if self.seen.get(key, top) != top:
            raise UserError(
                f"{printable(self.root / folder)} is a folder of {printable(self.seen[key])}, too: its images would be"
                " in both"
            )
        again = key in self.seen
        self.seen[key] = top
        return again

    def left_out(self) -> list[str]:
        """Returns what was passed over, a phrase each, such as "27 .heic (install s2a[heic] to read them)"."""
        named = sorted(self.endings.items(), key=lambda item: (item[0] not in INSTALL, -item[1], item[0]))
        phrases = [_ending(ending, count) for ending, count in named[:6]]
        if rest := sum(count for _, count in named[6:]):
            phrases.append(f"{rest} of {len(named) - 6} other endings")
        if self.strays:
            links = counted(len(self.strays), "link")
            phrases.append(f"{links} to other classes, splits or the folder above ({listed(self.strays, 3)})")
        return phrases


def _ending(ending: str, count: int) -> str:
    hint = f" (install {INSTALL[ending]} to read them)" if ending in INSTALL else ""
    return f"{count} {printable(ending) or 'without an ending'}{hint}"


def _class_files(walk: _Walk, tree: str) -> dict[str, list[str]]:
    """Returns class -> its image files as sorted paths relative to the root, nested folders included.

    Raises UserError for a class without an image, for one whose name is not UTF-8, and where there is no class.
    """
    top, by_class = walk.root / tree, {}
    for name in folders(top):
        if utf8(name) != name:  # the run's record could not be read again
            raise UserError(f"{printable(top / name)}: the name of this class is no text in UTF-8; rename the folder")
        before = walk.endings.copy()
        by_class[name] = walk.images(f"{tree}/{name}" if tree else name)
        if not by_class[name]:
            others = ", ".join(_ending(*item) for item in (walk.endings - before).most_common(4))
            accepted = f"accepted: {', '.join(EXTENSIONS)}"
            raise UserError(f"no image in {printable(top / name)}{f', but {others}' if others else ''}; {accepted}")
    if not by_class:
        raise UserError(
            f"{printable(top)} has no class folders; put the images of each class into a folder named after it"
        )
    return by_class


def _outside(root: Path, trees: dict[str, list[str]], beside_is: str) -> list[str]:
    """Returns what lies beside the splits, and images beside the class folders: a phrase each."""
    phrases, read = [], [tree for of_split in trees.values() for tree in of_split]
    tops = {tree.partition("/")[0] for tree in read}
    if "" not in read and (beside := [name for name in folders(root) if name not in tops]):
        phrases.append(f"{listed([f'{name}/' for name in beside])}, which is {beside_is}")
    for top in {root, *(root / tree for tree in read)}:
        with os.scandir(top) as entries:
            images = [
                entry.name
                for entry in entries
                if entry.name.lower().endswith(EXTENSIONS) and not hidden(entry.name) and not is_folder(entry)
            ]
        if images:
            phrases.append(f"{counted(len(images), 'image')} in no class folder ({listed([str(top / min(images))])})")
    return phrases


def _images(root: Path, by_class: dict[str, list[str]], classes: list[str], damaged: dict[str, str]) -> ImageFiles:
    """Returns the undamaged images with their labels. Raises UserError for a class that has none."""
    files, labels = [], []
    for name, of_class in by_class.items():
        good = [file for file in of_class if file not in damaged]
        if not good:
            raise UserError(
                f"no readable image in class {name!r} of {printable(root)}: all {len(of_class)} are damaged"
            )
        files += good
        labels += [classes.index(name)] * len(good)
    return ImageFiles(root, files, labels)


READERS = {"folder": read}
