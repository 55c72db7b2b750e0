"""Checks that the files and folders that a config names are there, before torch is imported to read them."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there
from s2a_cli.common.text import brief, printable

EMBEDDED = "embedded:"  # prefix of a checkpoint that ships in s2a_cli/weights/


def check_paths(config: DictConfig) -> None:
    """Raises UserError for a folder of images, or a checkpoint, that does not exist."""
    dataset, checkpoint = config.dataset, config.backbone.checkpoint
    root = dataset.root
    problems = missing_root(dataset.name, root, dataset.file)
    if dataset.test_root and not is_there(Path(dataset.test_root).expanduser()):
        problems.append(missing_folder("test_root", Path(dataset.test_root).expanduser()))
    if dataset.file and not is_there(Path(dataset.file).expanduser()):
        problems.append(f"dataset.file={brief(dataset.file, 200)}: no such file")
    if config.dataset.name == "folder" and root and not is_there(Path(root).expanduser()):
        problems.append(missing_folder("root", Path(root).expanduser()))
    if checkpoint and not checkpoint.startswith(EMBEDDED) and not is_there(Path(checkpoint).expanduser()):
        problems.append(missing_checkpoint(checkpoint))
    if problems:
        raise UserError("\n".join(problems))


def missing_root(name: str, root: str | None, file: str | None) -> list[str]:
    """Returns what to say about a data set of the user's own that does not say where it is."""
    if name == "folder" and not root:
        return ["dataset=folder needs dataset.root=FOLDER, your images"]
    if name == "table" and not file:
        return ["dataset=table needs dataset.file=FILE, a table of paths and labels"]
    return []


def check_photos(words: Iterable[str]) -> None:
    """Raises UserError for a file, a folder or a pattern of photos that nothing matches."""
    for word in words:
        path = Path(word).expanduser()
        if not is_there(path) and next(glob.iglob(str(path), recursive=True), None) is None:
            raise UserError(missing_photos(word))


def missing_photos(word: str) -> str:
    """Returns what to say about a word for photos that names none."""
    return f"images={brief(word, 200)}: no such file or folder, and no photo matches it"


def missing_folder(setting: str, path: Path) -> str:
    """Returns what to say about a folder of images, under this setting of the data set, that does not exist."""
    return f"dataset.{setting}={printable(path)} does not exist; give a folder of images, or an archive of one"


def missing_checkpoint(checkpoint: str) -> str:
    """Returns what to say about a checkpoint that does not exist."""
    return f"backbone.checkpoint={brief(checkpoint, 200)}: no such file"
