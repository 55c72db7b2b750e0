"""Settings of structures are read without torch, and are those that the structures have."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import pytest

from s2a_cli.config import structures
from s2a_cli.config.structures import STRUCTURES, Structures, declarations
from s2a_cli.methods import STRUCTURES as IMPORTED

WITHOUT_TORCH = """
import contextlib, io, sys
from s2a_cli.cli.main import main
for words in (["train", "--help"], ["train", "--help", "method=[lora,side]"], ["validate", "method=peft"]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert main(["train", "dataset=folder", "dataset.root=/no/such/folder", "backbone.checkpoint=/no/such/file"]) == 2
    assert main(["eval", "run=/no/such/run"]) == 2 and main(["train", "method.prompt.rnk=3"]) == 2
assert "dataset.root=/no/such/folder does not exist" in said.getvalue(), said.getvalue()
assert "backbone.checkpoint=/no/such/file: no such file" in said.getvalue(), said.getvalue()
assert not {"torch", "timm", "pandas", "matplotlib", "sklearn"} & sys.modules.keys()
"""


def described(kind: type) -> list:
    """The fields of a dataclass, with all that is declared of them."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # pyright: ignore[reportCallIssue]
        rule, types = field.metadata.get("rule"), str(hints[field.name]).replace(structures.__name__, "s2a_cli.methods")
        found.append((field.name, types, repr(default), field.metadata.get("help"), rule and rule.accepted))
    return found


def test_settings_are_those_of_the_structures():
    assert list(STRUCTURES) == list(IMPORTED)
    for name, kind in STRUCTURES.items():
        assert kind.__module__.startswith(structures.__name__), f"{name} was imported"
        assert described(kind) == described(IMPORTED[name].Settings), name


def test_help_and_refusals_need_no_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from s2a_cli.config.settings import setting
from s2a_cli.methods.base import BlocksSettings, Structure

{constant}

@dataclass
class MineSettings(BlocksSettings):
    rank: int = setting(MOST, help="of it")

class Mine(Structure):
    Settings = MineSettings
    kinds = (torch.nn.Linear,)

    def attach(self, backbone, beside=()):
        return torch.ones(1)

STRUCTURE = Mine
"""


@pytest.mark.parametrize("constant", ["MOST = 4", "MOST = torch.tensor(4).item()"])
def test_settings_that_stand_on_torch_are_not_read_in_part(constant, tmp_path, monkeypatch):
    monkeypatch.setattr(structures, "FOLDER", tmp_path)
    for name in ("base", "attachment"):
        (tmp_path / f"{name}.py").write_text((structures.PACKAGE / "methods" / f"{name}.py").read_text())
    (tmp_path / "mine.py").write_text(FILE.format(constant=constant))
    assert list(Structures()) == ["mine"]
    try:
        found = getattr(vars(declarations("mine")).get("STRUCTURE"), "Settings", None)
    finally:
        sys.modules.pop(f"{structures.__name__}.mine")
    assert (found is None) == ("torch" in constant)
    if found:
        assert [field.name for field in dataclasses.fields(found)] == ["blocks", "rank"] and found().rank == 4
