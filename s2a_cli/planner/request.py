"""What `s2a memory` is asked for: its words, read and judged without an import of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import expand
from s2a_cli.planner.sizes import size

# Words that are not of the composition.
OPTIONS = ("format", "figure", "fit", "devices", "context", "fragmentation", "expandable_segments", "processes")
OPTIONS += ("snapshot",)
FORMATS = ("terminal", "json", "csv")
FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Request:
    """What is to be predicted, for which devices, and how it is shown."""

    grid: list[list[str]]  # the words of each composition
    varied: list[int]  # places of those that differ
    form: str = "terminal"
    figure: Path | None = None
    force: bool = False
    fit: str | None = None  # a size, or cuda:N
    devices: list[str] = field(default_factory=list)  # sizes
    margin: dict[str, Any] = field(default_factory=dict)  # what differs from the defaults of a Margin
    processes: int = 1
    snapshot: Path | None = None

    def name(self, words: list[str]) -> str:
        """Returns the words of a composition in which it differs from the others."""
        return " ".join(words[place] for place in self.varied) or "this run"


def read_request(words: list[str]) -> Request:
    """Returns what the words ask for. Raises UserError for options that can't be, and for a first composition."""
    force, words = "--force" in words, [word for word in words if word != "--force"]
    given = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OPTIONS)
    rest = [word for word in words if word.partition("=")[0] not in OPTIONS]
    form, figure = given.get("format", "terminal"), Path(given["figure"]) if "figure" in given else None
    if form not in FORMATS:
        raise UserError(f"format={form}: expected one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    if figure and figure.suffix not in FIGURES:
        raise UserError(f"figure={figure}: expected a file that ends in one of {', '.join(FIGURES)}")
    if "snapshot" in given:
        if rest or len(given) > 1:
            raise UserError("snapshot=FILE replays what a device has recorded, and takes no other word")
        return Request([], [], snapshot=Path(given["snapshot"]).expanduser())
    if figure:
        from s2a_cli.results import made_files

        made_files.check_out(figure, "figure", force)
    if "fit" in given and not re.fullmatch(r"cuda(:\d+)?", given["fit"]):
        size("fit", given["fit"])
    margin, processes = _margin(given), _processes(given.get("processes", "1"))
    names = given["devices"].split(",") if "devices" in given else []
    if names and (odd := next((key for key in ("fit", "figure") if key in given), None)):
        raise UserError(f"{odd}={given[odd]}: goes without devices=, which is a table of its own")
    for name in names:
        size("devices", name)
    grid = expand(rest)
    compose(grid[0])
    varied = [place for place in range(len(rest)) if len({member[place] for member in grid}) > 1]
    return Request(grid, varied, form, figure, force, given.get("fit"), names, margin, processes)


def _margin(given: dict[str, str]) -> dict[str, Any]:
    """Returns what these options change of a margin. Raises UserError for values that can't be."""
    changes: dict[str, Any] = {}
    if "context" in given:
        changes["context"] = size("context", given["context"])
    if (text := given.get("fragmentation")) is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 <= share < 1:
            raise UserError(
                f"fragmentation={text}: expected a share of what the allocator takes, at least 0 and below 1, such as"
                " 0.05 or 5%"
            )
        changes["fragmentation"] = share
    if (text := given.get("expandable_segments")) is not None:
        if text not in ("true", "false"):
            raise UserError(f"expandable_segments={text}: expected true or false, as PYTORCH_CUDA_ALLOC_CONF sets it")
        changes["expandable_segments"] = text == "true"
    return changes


def _processes(text: str) -> int:
    """Returns the number behind `processes=`. Raises UserError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise UserError(f"processes={text}: expected the number of processes that share a batch, at least 1")
    return int(text)
