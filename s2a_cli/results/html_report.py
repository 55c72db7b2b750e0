"""`s2a report`: one self-contained page of many runs.

The page is report.html, filled in by Jinja, which escapes all texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import first_line, printable
from s2a_cli.results import pages, pivot, pivot_text, plan_text, plots, record, run_folder, summary
from s2a_cli.results.aggregate import BASE, KINDS, hidden_notes, memory_kinds, read, runs_of, select, tell, varying
from s2a_cli.results.formats import label, mib, number
from s2a_cli.results.frames import column, column_counts, grouped, groups_of, is_missing, numeric, where
from s2a_cli.results.looks import Looks
from s2a_cli.results.made_files import check_out, save

NOTHING: dict[str, Any] = {"panels": [], "legend": []}  # where there is nothing to draw
CURVES = {"panels": 9, "lines": 10, "runs": 3, "points": 60}  # most of each in the learning curves
BARS = 40  # most memory bars
PLANS = 10  # most plans
MEMORY = ("memory.peak_mib", "memory.static_mib", "memory.kept_mib", "memory.full_finetune_peak_mib")


def write(places: list[str], wanted: dict[str, str], out: Path, force: bool = False) -> str:
    """Writes the page and returns a line about it; what can't be read is named on stderr and in the page.

    Raises UserError when there are no runs, when `out` can't be written, and without `force` when it is no page of
    ours.
    """
    check_out(out, "out", force)
    frame, odd = read(places)
    if frame.empty:
        why = f" ({len(odd)} can't be read, the first: {odd[0]})" if odd else ""
        raise UserError(f"no finished runs below {', '.join(map(str, places))}{why}; make one with: s2a train")
    page = html(select(frame, wanted, ("out",)), odd, out.parent)
    tell(odd)
    save(out, page, "out", force)
    left = f", {len(odd)} that can't be read" if odd else ""
    return f"{out}: {len(page.encode()) / 2**20:.1f} MiB, {len(frame)} results{left}"


def html(frame: pd.DataFrame, odd: list[str], beside: Path) -> str:
    """Returns the page of the runs in `frame`, see aggregate.load; links to run folders are relative to `beside`."""
    runs, rows = runs_of(frame), summary.table(frame)
    looks = plots.looks_of(runs)
    with plots.plt.rc_context(plots.STYLE):
        drawn = [_pareto(rows, "peak_mib", looks), _pareto(rows, "trainable", looks)]
        curves = _curves(runs, looks, odd)
    return pages.render(
        "report.html",
        counts=runs["status"].value_counts().to_dict(),
        settings=_numbered(summary.readable(rows)),
        notes=[*summary.NOTES, *hidden_notes(frame, summary.settings_shown(rows))],
        grid=_grid(frame),
        pareto=drawn,
        curves=curves,
        bars=_bars(runs),
        bars_most=BARS,
        runs=_runs(runs, beside),
        plans=_plans(runs),
        plan_head=list(plan_text.HEAD),
        failures=_failures(runs, beside),
        odd=odd,
        environments=_environments(runs),
    )


def _numbered(text: pd.DataFrame) -> dict[str, Any]:
    return {"head": list(text), "right": summary.RIGHT, "lines": text.values.tolist()}


def _grid(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Returns method x dataset with its tests; None for a single row or data set."""
    runs = runs_of(frame)
    vary = varying(runs)
    if not vary or not varying(runs, ["dataset"]):
        return None
    table, notes = pivot_text.table(pivot.make(frame, vary, ["dataset"]))
    return _numbered(table.text) | {"right": table.right, "bold": table.bold, "notes": notes}


def _pareto(rows: pd.DataFrame, cost: str, looks: Looks) -> dict[str, Any]:
    panels, said = plots.pareto_panels(rows, cost, looks)
    title = {"peak_mib": "Accuracy against peak memory", "trainable": "Accuracy against trainable parameters"}[cost]
    return pages.drawn(panels, cost) | {"title": title, "said": said}


def _curves(runs: pd.DataFrame, looks: Looks, odd: list[str]) -> dict[str, Any]:
    """Returns learning curves from metrics.jsonl beside result.json, thinned to CURVES, and a line on what is left out.

    Adds a line to `odd` for each file that can't be read.
    """
    if "path" not in runs:
        return NOTHING | {"said": "No run folders: no learning curves."}
    settings = grouped(runs, ["backbone", "dataset", "method", "quant"])["path"].agg(list)
    panels = settings.groupby(level=["backbone", "dataset"]).size().sort_values(ascending=False)
    found = []
    for place in panels.index[: CURVES["panels"]]:
        lines = []
        for (method, quant), paths in settings.loc[place][: CURVES["lines"]].items():
            read = [points for path in paths[: CURVES["runs"]] if (points := _metrics(path, odd)) is not None]
            if read:
                mean: pd.DataFrame = grouped(pd.concat(read), "epoch")[["score"]].mean().reset_index()
                lines.append((str(method), str(quant), mean.iloc[:: -(-len(mean) // CURVES["points"])]))
        if lines:
            of_place = where(runs, (runs["backbone"] == place[0]) & (runs["dataset"] == place[1]))
            metric = "mAP" if any(column(of_place, "accuracy.val_map").notna()) else "top-1"
            found.append((" · ".join(place), f"validation {metric} %", lines))
    if not found:
        return NOTHING | {"said": "No metrics.jsonl with validation beside the results."}
    said = (
        "Mean over the runs of a method and quant, {runs} of them at most; {panels} panels, {lines} lines, {points}"
        " points at most."
    )
    left = f" {len(panels) - CURVES['panels']} panels are left out." if len(panels) > CURVES["panels"] else ""
    return pages.drawn(plots.curves(found, looks), "curves") | {"said": said.format(**CURVES) + left}


def _metrics(path: str, odd: list[str]) -> pd.DataFrame | None:
    """Returns epoch and score, top-1 or mAP in %, of a run; None without the file or without validation.

    Returns None, too, where it can't be read, and adds a line to `odd`.
    """
    beside = Path(path).with_name(run_folder.METRICS)
    try:
        points = record.read_metrics(beside)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        odd.append(printable(f"{beside}: {getattr(error, 'strerror', None) or first_line(error)}"))
        return None
    return pd.DataFrame(points, columns=["epoch", "score"]) if points else None


def _bars(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns what a step takes for each setting whose memory is known: static, kept and transient MiB.

    Full fine-tuning's peak is beside them. Bars are of finished runs, BARS of them at most.
    """
    known = where(runs, (runs["status"] == "ok") & runs["memory.peak_mib"].notna())
    known = known.reindex(columns=list(dict.fromkeys([*runs, *MEMORY, "config.precision"])))
    known = known.assign(kind=memory_kinds(known))
    by = ["backbone", "config.backbone.image_size", "config.optim.batch_size", "config.precision"]
    bars = []
    for names, group in groups_of(known, [*by, "method", "quant", "kind"], dropna=False)[:BARS]:
        peak, static, kept, full = (_mean(group, name) for name in MEMORY)
        backbone, size, batch, precision, method, quant, kind = map(label, names)
        widest = max(peak, full)
        parts = {"static": static, "kept": kept, "transient": max(0.0, peak - static - kept)}
        bars.append(
            {
                "name": f"{method} {quant}",
                "where": f"{backbone}, {'' if size == 'null' else f'{size} px, '}batch {batch}, {precision}",
                "kind": kind,
                "parts": {part: (100 * value / widest, mib(value)) for part, value in parts.items() if widest},
                "full": (100 * full / widest, mib(full)) if full else None,
                "peak": mib(peak),
                "x": number(full / peak, 2) if full and peak else "–",
            }
        )
    return bars


def _mean(runs: pd.DataFrame, name: str) -> float:
    """Returns the mean of a figure over runs, 0 where none has it."""
    mean = float(numeric(column(runs, name)).mean())
    return 0.0 if is_missing(mean) else mean


def _folder(path: Any, beside: Path) -> str:
    return os.path.relpath(os.path.dirname(path), beside) if isinstance(path, str) else ""


def _runs(runs: pd.DataFrame, beside: Path) -> list[list[str]]:
    """Returns a line a run: data set, backbone, method, quant, seed, status, top-1, peak, memory, images/s, folder."""
    shown = ["accuracy.test_top1", "accuracy.test_map", "memory.peak_mib", "memory.kind"]
    shown += ["throughput.train_images_per_second", "path"]
    lines = []
    for *names, seed, status, top1, mean_ap, peak, kind, speed, path in _values(
        runs, ["config.seed", "status", *shown]
    ):
        score = f"{number(mean_ap, 2)} mAP" if is_missing(top1) and not is_missing(mean_ap) else number(top1, 2)
        figures = [score, mib(peak), KINDS.get(kind, "–"), mib(speed)]
        lines.append([*names, label(seed), status, *figures, _folder(path, beside)])
    return lines


def _plans(runs: pd.DataFrame) -> list[tuple[str, list[list[str]]]]:
    """Returns (names of the run, lines of its plan) of the runs that were planned, PLANS of them at most."""
    found = []
    for *names, seed, choices in _values(runs, ["config.seed", "plan.choices"]):
        if isinstance(choices, str):
            found.append((" · ".join(map(str, [*names, f"seed {label(seed)}"])), plan_text.lines(json.loads(choices))))
    return found[:PLANS]


def _failures(runs: pd.DataFrame, beside: Path) -> list[list[str]]:
    """Returns a line a run that failed or was broken off: names, seed, status, error, folder."""
    failed = where(runs, [status not in ("ok", "running") for status in runs["status"]])
    return [
        [*names, label(seed), status, str(error or ""), _folder(path, beside)]
        for *names, seed, status, error, path in _values(failed, ["config.seed", "status", "error", "path"])
    ]


def _values(runs: pd.DataFrame, names: list[str]) -> Iterable[tuple[Any, ...]]:
    """Returns the values of BASE and of these columns, a tuple a run; a column that is not there holds nan."""
    return runs.reindex(columns=[*BASE, *names]).itertuples(index=False, name=None)


def _environments(runs: pd.DataFrame) -> list[tuple[str, list[tuple[str, int]]]]:
    """Returns (key, [(value, number of runs)]) of all that was recorded of machines and versions."""
    names = [c for c in runs if c.startswith("environment.")]
    return [(name.removeprefix("environment."), column_counts(column(runs, name).map(label))) for name in names]
