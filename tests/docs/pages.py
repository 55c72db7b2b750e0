"""The pages of the documentation, their blocks of code, and the commands in these."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("lightning",)  # whose blocks are run where they are installed
NEEDS = ("network", "gpu", "photos", "minutes", "a SLURM cluster", *PACKAGES)
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (needs|given): ([^()\n]+?)(?: \(.*\))? -->\n\Z")
PROGRAMS = (
    *("scripts/s2a", "scripts/test", "scripts/check", ".venv/bin/python", ".venv/bin/pip", ".venv/bin/mkdocs"),
    *("bin/torchrun", "bin/pip", "bin/s2a"),
)
RECORDER = """#!/bin/sh
printf '%s\\037' "${0##*/}" "$@" >>"$CALLS"; printf '\\036' >>"$CALLS"
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and what the comment before it says: what it needs, or what is given."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    needs: tuple[str, ...]
    given: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found, text = [], page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        comment = COMMENT.search(text[: fence.start()])
        said = {comment[1]: comment[2]} if comment else {}
        needs = tuple(said["needs"].split(", ")) if "needs" in said else ()
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[1], fence[2] or "", fence[3], needs, said.get("given", "")))
    return found


def commands(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a shell block, with their words, as bash reads them; none of them is run.

    Fails where the block calls a program that is not in PROGRAMS.
    """
    calls = folder / "calls"
    for program in PROGRAMS:
        stand_in = folder / program
        if not stand_in.exists():
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text(RECORDER)
            stand_in.chmod(0o755)
    calls.write_text("")
    environment = {"CALLS": str(calls), "PATH": f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    done = subprocess.run(
        ["bash", "-euc", block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    return [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]


def printed(block: Block) -> list[str]:
    """What a Python block says that it prints: the comments behind its calls of print."""
    return re.findall(r"^print\(.*\)  # (\S+)$", block.text, re.MULTILINE)


def applied(diff: str, text: str) -> str:
    """`text` with the hunks of a diff applied, which are separated by blank lines and have no headers."""
    for hunk in re.split(r"\n\n", diff.rstrip("\n")):
        lines = hunk.split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
        assert text.count(f"{old}\n") == 1, f"these lines are not there, or more than once:\n{old}"
        text = text.replace(f"{old}\n", f"{new}\n")
    return text


def slug(heading: str) -> str:
    """The anchor of a heading."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"`|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower())
    return re.sub(r"[\s-]+", "-", plain).strip("-")
