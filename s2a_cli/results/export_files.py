"""Where the files of an exported model lie, and what may be written there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there
from s2a_cli.common.text import nearest

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # as timm and the hub name them in a folder
SUFFIXES = {  # of the file of each format; timm reads a folder
    "timm": "",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torchscript": ".pt",
    "torch-export": ".pt2",
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages; the extra of this name has them


def beside(to: str, path: Path) -> tuple[Path, Path]:
    """Returns where the description and the card of an export lie: in its folder, or beside its file."""
    if not SUFFIXES[to]:
        return path / CONFIG, path / CARD
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.md")


def check(to: str, out: Path, force: bool) -> None:
    """Raises UserError for a format that there is not or that needs a package, and for where it can't go."""
    if to not in SUFFIXES:
        raise UserError(f"to={to}: expected one of {', '.join(SUFFIXES)}{nearest(to, SUFFIXES)}")
    if missing := [package for package in NEEDS.get(to, ()) if importlib.util.find_spec(package) is None]:
        raise UserError(f"to={to} needs {' and '.join(missing)}: pip install 's2a[{to}]'")
    if SUFFIXES[to]:
        if out.suffix != SUFFIXES[to]:
            raise UserError(f"out={out}: to={to} writes a file that ends in {SUFFIXES[to]}")
        if out.is_dir():
            raise UserError(f"out={out}: is a folder; expected the name of a file")
        there = [path for path in (out, *beside(to, out)) if is_there(path)]
    else:
        if meant := next((name for name, suffix in SUFFIXES.items() if suffix and suffix == out.suffix), None):
            raise UserError(f"out={out}: to={to} makes a folder; add to={meant} for such a file")
        strangers = sorted({path.name for path in out.iterdir()} - {WEIGHTS, CONFIG, CARD}) if out.is_dir() else []
        if strangers:
            raise UserError(f"out={out}: holds {strangers[0]}, which is not of an export; choose another folder")
        there = [out] if is_there(out) else []
        if there and not out.is_dir():
            raise UserError(f"out={out}: is a file; to={to} makes a folder")
    if there and not force:
        raise UserError(f"out={there[0]}: is there already; choose another name, or add --force")
