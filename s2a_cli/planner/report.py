"""Writes predictions as text, JSON and CSV. Every figure is a predicted one and in MiB, unless it says otherwise."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from s2a_cli.common.text import natural
from s2a_cli.config.settings import replaced
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.cuda import Difference, differences
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.replay import Replay
from s2a_cli.memory.result import MIB
from s2a_cli.memory.watch import NAMES, USES
from s2a_cli.planner.fallbacks import Option
from s2a_cli.planner.run_memory import Composition
from s2a_cli.results import plan_text
from s2a_cli.results.record import Plan


@dataclass
class Fitted:
    """What `fit=` has found for a composition."""

    available: int  # bytes of the device
    margin: Margin
    needed: float  # bytes of the device, for the batch as configured
    largest: int  # batch; 0: not even one image
    options: list[Option] = field(default_factory=list)  # where the batch does not fit


@dataclass
class Prediction:
    """What one step of a composition needs, and what it needs under full fine-tuning."""

    profile: Profile
    full: Profile

    @property
    def times(self) -> float:
        """How many times less the peak is."""
        return self.full.peak_bytes / self.profile.peak_bytes


@dataclass
class Row:
    """A composition with its prediction, or with the reason why there is none."""

    name: str  # the words in which it differs from others
    composition: Composition
    predicted: Prediction | None = None
    problem: str | None = None
    fitted: Fitted | None = None
    plan: Plan | None = None

    def planned(self, plan: Plan) -> None:
        """Takes the settings of a plan for its own."""
        self.plan = plan
        self.composition = replace(self.composition, config=replaced(self.composition.config, plan["settings"]))


def mib(bytes: float) -> str:
    """Returns bytes in MiB, with a digit behind the point."""
    return f"{bytes / MIB:,.1f}"


def one(row: Row) -> str:
    """Returns the peak of a composition and where it is, beside full fine-tuning; empty without a prediction."""
    if row.predicted is None:
        return ""
    mine, full = row.predicted.profile, row.predicted.full
    step = "pass" if mine.phase != "update" else "of the weights"
    lines = [
        *([plan_text.render(row.plan), ""] if row.plan else []),
        f"{row.composition.title} · predicted, not measured",
        *([f"assumed: {row.composition.assumed}"] if row.composition.assumed else []),
        "",
        (
            f"peak {mib(mine.peak_bytes)} MiB, {row.predicted.times:.1f}x below full fine-tuning"
            f" ({mib(full.peak_bytes)} MiB), in the {mine.phase} {step}, at {mine.place}"
        ),
        f"between steps {mine.memory.static_mib:,.1f} MiB; after the forward pass {mine.memory.kept_mib:,.1f} MiB more",
        "",
    ]
    uses, whole = mine.by("use"), full.by("use")
    table = [[NAMES[use], mib(uses.get((use,), 0)), mib(whole.get((use,), 0))] for use in USES]
    table.append(["sum", mib(mine.peak_bytes), mib(full.peak_bytes)])
    lines += [_table(table, ["alive at the peak, MiB", "this run", "full fine-tuning"]), ""]
    lines += [_by(mine, "family", "by operator family"), "", _by(mine, "place", "by part of the model"), ""]
    lines += cuda_lines(mine)
    if row.fitted:
        lines += ["", *fit_lines(row.fitted, row.composition.batch)]
    return "\n".join(lines)


def _by(profile: Profile, key: str, title: str) -> str:
    """Returns a table of kept and transient memory, and all else, by family or place."""
    own = ("kept", "transient", "gradients")
    columns = {use: (use,) for use in own} | {"static and batch": tuple(use for use in USES if use not in own)}
    sums = {column: profile.by(key, uses=uses) for column, uses in columns.items()}
    names = list(dict.fromkeys(part.place for part in profile.parts)) if key == "place" else []
    order = sorted(names, key=natural) if names else [name for (name,) in profile.by(key)]
    lines = [[name, *(mib(sums[column].get((name,), 0)) for column in columns)] for name in order]
    return _table(_merged(lines), [f"{title}, MiB", *columns])


def _merged(lines: list[list[str]]) -> list[list[str]]:
    """Returns the lines with neighbours of the same figures as one: "blocks.1 to blocks.9, each"."""
    merged: list[tuple[str, list[str]]] = []
    for name, *figures in lines:
        if merged and merged[-1][1] == figures:
            merged[-1] = (f"{merged[-1][0].partition(' to ')[0]} to {name.removesuffix(', each')}, each", figures)
        else:
            merged.append((name, figures))
    return [[name, *figures] for name, figures in merged]


def cuda_lines(profile: Profile) -> list[str]:
    """Returns lines about what a CUDA device adds to the peak, apart from it."""
    found = [
        f"  {d.name}: {'at most ' if d.is_bound else ''}{d.mib:,.1f} MiB ({d.why})" for d in differences(profile.calls)
    ]
    taken, growing = profile.reserved_bytes(), profile.reserved_bytes(expandable=True)
    return [
        "on CUDA, beside the peak (modelled from documentation, not confirmed on a device):",
        *found,
        (
            f"  taken from the device by PyTorch's allocator, a simulation of it: {mib(taken)} MiB, with"
            f" expandable_segments {mib(growing)} MiB; the CUDA context comes on top"
        ),
    ]


def replayed(replay: Replay) -> str:
    """Returns what an allocator took from its device, beside what the simulation has it take."""
    as_set, other = ("true", "false") if replay.expandable else ("false", "true")
    lines = [
        [f"expandable_segments={as_set}, as recorded", mib(replay.recorded), mib(replay.simulated)],
        [f"expandable_segments={other}", "–", mib(replay.otherwise)],
    ]
    said = f"cuda:{replay.device}: {replay.events:,} blocks came or went, {mib(replay.allocated)} MiB at the most"
    if replay.before:
        said += f"; {replay.before:,} blocks were there before the recording, placed one behind the other"
    return "\n".join([said, "", _table(lines, ["taken from the device, MiB", "recorded", "simulated"])])


def fit_lines(fitted: Fitted, batch: int) -> list[str]:
    """Returns lines about whether a batch fits, which would, and what else would make it fit."""
    verdict = "fits" if fitted.needed <= fitted.available else "does not fit"
    lines = [
        (
            f"fit: batch {batch} {verdict}: {mib(fitted.needed)} of {mib(fitted.available)} MiB, margin included"
            f" ({fitted.margin})"
        ),
        f"largest batch that fits: {fitted.largest or 'none, not even one image'}",
    ]
    if fitted.options:
        table = [
            [" ".join(o.words), mib(o.needed), "fits" if o.needed <= fitted.available else "no", o.about]
            for o in fitted.options
        ]
        lines += [
            "",
            _table(table, ["would change it, cheapest in speed first", "needs, MiB", "", "what it is"], left=(0, 2, 3)),
        ]
    return lines


def several(rows: list[Row]) -> str:
    """Returns a table, a line a composition."""
    fits = any(row.fitted for row in rows)
    header = ["run", "peak", "static", "gradients", "kept", "transient", "below full", "peak in"]
    header += ["largest batch"] if fits else []
    table = []
    for row in rows:
        if row.predicted is None:
            table.append([row.name, *["–"] * (len(header) - 1)])
            continue
        profile = row.predicted.profile
        uses = profile.by("use")
        sums = [uses.get((use,), 0) for use in ("gradients", "kept", "transient")]
        static = profile.peak_bytes - sum(sums)
        figures = [mib(value) for value in (profile.peak_bytes, static, *sums)]
        fitted = [str(row.fitted.largest or "none") if row.fitted else "–"] if fits else []
        table.append([row.name, *figures, f"{row.predicted.times:.1f}x", profile.phase, *fitted])
    notes = [
        "MiB at the peak, predicted, not measured; static: with the images; below full: against full fine-tuning of the"
        " same"
    ]
    notes += dict.fromkeys(f"assumed: {row.composition.assumed}" for row in rows if row.composition.assumed)
    notes += [f"{row.name}: {row.problem}" for row in rows if row.problem]
    if fits:
        first = next(row.fitted for row in rows if row.fitted)
        notes.append(f"largest batch: of those that fit {mib(first.available)} MiB less a margin: {first.margin}")
    return "\n".join([_table(table, header), "", *notes])


def _table(lines: list[list[str]], header: list[str], left: Iterable[int] = (0,)) -> str:
    align = ["left" if place in left else "right" for place in range(len(header))]
    return tabulate(lines, header, disable_numparse=True, colalign=align)


def as_json(rows: list[Row]) -> str:
    """Returns a list with an object for each composition. All is in MiB; `parts` add up to `peak_mib`."""
    return json.dumps([_plain(row) for row in rows], indent=2)


def _plain(row: Row) -> dict[str, Any]:
    """Returns what JSON holds of a composition."""
    composition = row.composition
    found: dict[str, Any] = {
        "name": row.name,
        "kind": "predicted",
        "composition": composition.title,
        "batch": composition.batch,
        "classes": composition.classes,
        "assumed": composition.assumed,
        "problem": row.problem,
    }
    if row.predicted:
        profile = row.predicted.profile
        found |= {
            "peak_mib": profile.peak_bytes / MIB,
            "phase": profile.phase,
            "place": profile.place,
            "static_mib": profile.memory.static_mib,
            "kept_mib": profile.memory.kept_mib,
            "full_finetune_peak_mib": row.predicted.full.peak_bytes / MIB,
            "parts": [
                {"use": p.use, "family": p.family, "place": p.place, "mib": p.bytes / MIB} for p in profile.parts
            ],
            "cuda": {
                "reserved_mib": profile.reserved_bytes() / MIB,
                "reserved_expandable_mib": profile.reserved_bytes(expandable=True) / MIB,
                "differences": [_difference(d) for d in differences(profile.calls)],
            },
        }
    if row.plan:
        found["plan"] = row.plan
    if row.fitted:
        fitted = row.fitted
        found["fit"] = {
            "available_mib": fitted.available / MIB,
            "context_mib": fitted.margin.context / MIB,
            "fragmentation": fitted.margin.fragmentation,
            "expandable_segments": fitted.margin.expandable_segments,
            "needed_mib": fitted.needed / MIB,
            "largest_batch": fitted.largest,
            "options": [
                {"words": list(o.words), "needed_mib": o.needed / MIB, "fits": o.needed <= fitted.available}
                for o in fitted.options
            ],
        }
    return found


def _difference(difference: Difference) -> dict[str, Any]:
    return {"name": difference.name, "mib": difference.mib, "is_bound": difference.is_bound, "why": difference.why}


def as_csv(rows: list[Row]) -> str:
    """Returns a line for each part of each composition; the bytes of a composition's lines add up to its peak."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "kind", "use", "family", "place", "mib", "bytes", "problem"])
    for row in rows:
        for part in row.predicted.profile.parts if row.predicted else ():
            writer.writerow(
                [row.name, "predicted", part.use, part.family, part.place, f"{part.bytes / MIB:.4f}", part.bytes, ""]
            )
        if row.predicted is None:
            writer.writerow([row.name, "", "", "", "", "", "", row.problem])
    return text.getvalue().rstrip("\n")
