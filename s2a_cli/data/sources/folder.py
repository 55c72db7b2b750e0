"""Reads the user's own images: one folder a class, in train/[val/]test/ trees or in one tree that is split by seed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import reason, sha256_of
from s2a_cli.common.text import counted, listed, printable
from s2a_cli.config.paths import missing_folder
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.archives import SUFFIXES, extract_once
from s2a_cli.data.images import EXTENSIONS, INSTALL, ImageFiles
from s2a_cli.data.integrity import DARK, Report, examine
from s2a_cli.data.layout import folders, hidden, is_folder, names_split, split_folders, within
from s2a_cli.data.source import Source


def read(config: DatasetConfig, cache: Path) -> Source:
    """Reads `config.root`, a folder or an archive of one, which is extracted into `cache` once.

    Decodes every image once. Raises UserError for a class without an image, for a class that is not in train, and,
    unless config.on_corrupt is "skip", for an image that cannot be decoded.
    """
    assert config.root is not None, "data.problems asks for it"
    root = _open_root(Path(config.root).expanduser(), cache)
    trees = split_folders(root, config.layout)
    walk = _Walk(root)
    found = {split: _class_files(walk, tree) for split, tree in trees.items()}
    classes = sorted(found["train"])
    for split, by_class in found.items():
        if extra := sorted(set(by_class) - set(classes)):
            raise UserError(f"{printable(root / trees[split])} has classes that train does not have: {listed(extra)}")
    if len(classes) < 2:
        (only,) = classes
        inner = folders(root / trees["train"] / only)
        hint = f"; is dataset.root={printable(root / only)} what you mean?" if not trees["train"] and inner[1:] else ""
        raise UserError(
            f"{printable(root / trees['train'])} has one class folder, {only!r}; two or more are needed{hint}"
        )

    files = sorted(file for by_class in found.values() for files in by_class.values() for file in files)
    report = examine(root, files, cache / "checked")
    if report.damaged and config.on_corrupt == "stop":
        (first, why), *more = report.damaged.items()
        others = f", and {len(more)} more: {listed([file for file, _ in more])}" if more else ""
        raise UserError(
            f"{printable(root / first)} is not a readable image ({why}){others}; "
            "mend or remove it, or leave such images out with dataset.on_corrupt=skip"
        )
    splits = {split: _images(root, found[split], classes, report.damaged) for split in found}
    left_out = [*walk.left_out(), *_outside(root, trees), *_damaged(report)]
    train, val, test = splits["train"], splits.get("val"), splits.get("test")
    return Source(train, val, test, classes, report.revision, left_out, _dark(report), report.same)


def _open_root(root: Path, cache: Path) -> Path:
    """Returns the folder of images: `root`, or what the archive `root` holds. Raises UserError where it is neither."""
    try:
        if root.is_dir():
            return root
        there = root.exists()
    except OSError as error:  # a folder above that may not be entered, a name too long
        raise UserError(f"dataset.root={printable(root)} cannot be read ({reason(error)})") from error
    if not there:
        raise UserError(missing_folder("root", root))
    if not root.name.lower().endswith(SUFFIXES):
        raise UserError(f"dataset.root={printable(root)} is neither a folder nor an archive ({', '.join(SUFFIXES)})")
    digest = sha256_of(root)
    tree = cache / f"{root.name.split('.')[0]}-{digest[:16]}"
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
        """Returns what was passed over, a phrase each, such as "27 .heic (install pillow-heif to read them)"."""
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

    Raises UserError for a class without an image, and where there is no class.
    """
    top, by_class = walk.root / tree, {}
    for name in folders(top):
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


def _outside(root: Path, trees: dict[str, str]) -> list[str]:
    """Returns what lies beside the splits, and images beside the class folders: a phrase each."""
    phrases = []
    if trees["train"] and (beside := [name for name in folders(root) if name not in trees.values()]):
        phrases.append(f"{listed([f'{name}/' for name in beside])}, which is no split")
    for top in {root, *(root / tree for tree in trees.values())}:
        with os.scandir(top) as entries:
            images = [
                entry.name
                for entry in entries
                if entry.name.lower().endswith(EXTENSIONS) and not hidden(entry.name) and not is_folder(entry)
            ]
        if images:
            phrases.append(f"{counted(len(images), 'image')} in no class folder ({listed([str(top / min(images))])})")
    return phrases


def _damaged(report: Report) -> list[str]:
    if not report.damaged:
        return []
    first = [f"{file}: {why}" for file, why in report.damaged.items()]
    return [f"{len(first)} that can't be read ({listed(first, 10)})"]


def _dark(report: Report) -> list[str]:
    if not report.dark:
        return []
    return [
        f"nearly black: {len(report.dark)} ({listed(report.dark, 3)}): no value reaches {DARK} of 255;"
        " do these files hold fewer bits than they have room for?"
    ]


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
