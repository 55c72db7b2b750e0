"""Checks that the files and folders that a config names are there, before torch is imported to read them."""

from __future__ import annotations

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
    problems: list[str] = []
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


def missing_folder(setting: str, path: Path) -> str:
    """Returns what to say about a folder of images, under this setting of the data set, that does not exist."""
    return f"dataset.{setting}={printable(path)} does not exist; give a folder of images, or an archive of one"


def missing_checkpoint(checkpoint: str) -> str:
    """Returns what to say about a checkpoint that does not exist."""
    return f"backbone.checkpoint={brief(checkpoint, 200)}: no such file"
