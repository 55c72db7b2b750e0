"""The table and the figure of compare_structures.py, made of its results.json alone:

.venv/bin/python benchmarks/structures/compare_report.py OUT [vit_b]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from s2a_cli.common import files
from s2a_cli.results.significance import difference, holm

RESULTS = "results.json"
AGAINST = "s2a"
NAMED = (AGAINST, "full")  # in the figure, beside those on the front
FRONT: dict[str, Any] = dict(where="post", color="tab:red", linewidth=0.8, label="nothing is better in less")
# words, validation {setting: %}, test and last {data set: [% a seed]}, peaks {codes: MiB}, percent
Entry = dict[str, Any]


def load(out: Path) -> dict[str, Entry]:
    """The entries so far, by contender."""
    path = out / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def tops(entry: Entry) -> pd.Series:
    """Test top-1 in %, by data set and seed."""
    return pd.Series(
        {(data, i): top for data, tops in entry["test"].items() for i, top in enumerate(tops)}, dtype=float
    )


def rows(entries: dict[str, Entry]) -> pd.DataFrame:
    """A line a contender, the best first: accuracies, what it differs from S2A by, and what it costs."""
    found = {}
    for name, entry in entries.items():
        seeds = [mean(of_seed) for of_seed in zip(*entry["test"].values(), strict=True)]  # over the data sets
        found[name] = {
            "setting": " ".join(re.sub(r"^[a-z0-9_.]+\.", "", word) for word in entry["words"][1:]),
            **{data: mean(values) for data, values in entry["test"].items()},
            "mean": mean(seeds),
            "std": stdev(seeds) if len(seeds) > 1 else float("nan"),
            "val., last epoch": mean(mean(of) for of in entry["last"].values()) if "last" in entry else float("nan"),
            "trained %": entry.get("percent"),
            "x full's images/s": entry.get("speed_ratio", float("nan")),
            **{f"{codes} MiB": peak for codes, peak in entry["peaks"].items()},
        }
    table = pd.DataFrame.from_dict(found, orient="index").sort_values("mean", ascending=False)
    if AGAINST in entries:
        others = [name for name in table.index if name != AGAINST]
        gaps = [difference(tops(entries[name]), tops(entries[AGAINST])) for name in others]
        corrected = dict(zip(others, holm(gap.p for gap in gaps), strict=True))
        shown = {name: f"{gap.mean:+.1f} ± {gap.error:.1f}" for name, gap in zip(others, gaps, strict=True)}
        position = list(table.columns).index("std") + 1
        table.insert(position, f"- {AGAINST}", [shown.get(name, "") for name in table.index])
        table.insert(position + 1, "p", [corrected.get(name, float("nan")) for name in table.index])
    return table


def report(entries: dict[str, Entry], out: Path, backbone: str) -> None:
    """Writes table.md and structures.png."""
    table = rows(entries)
    floats = table.select_dtypes("number").columns
    text = table.astype(object)
    for name in floats:
        digits = {"p": 3, "trained %": 3, "x full's images/s": 2}.get(name, 0 if name.endswith("MiB") else 1)
        text[name] = [("" if pd.isna(value) else f"{value:,.{digits}f}") for value in table[name]]
    files.atomic_write(out / "table.md", text.to_markdown(disable_numparse=True) + "\n")
    draw(table, backbone, out / "structures.png")


def draw(table: pd.DataFrame, backbone: str, path: Path) -> None:
    """Accuracy against the predicted peak, without codes and with quant=tiny, and the front of both."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points: list[tuple[float, float, str]] = []
    for codes, marker in (("none MiB", "o"), ("tiny MiB", "v")):
        if codes not in table:
            continue
        for name, peak, top in zip(table.index, table[codes], table["mean"]):
            if not pd.isna(peak):
                points.append((peak, top, str(name)))
                ours = bool({"side", "s2a"} & set(str(name).split("+")))
                axes.plot(peak, top, marker, color="tab:blue" if ours else "tab:gray")
    front, best = [], -1.0
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if point[1] > best:
            best = point[1]
            front.append(point)
    if front:
        axes.step(*zip(*(point[:2] for point in front), strict=True), **FRONT)
    named = {*front, *(min(of) for name in NAMED if (of := [point for point in points if point[2] == name]))}
    low, high = axes.get_ylim()
    gap, height = (high - low) / 28, float("inf")  # names nearer than the gap would lie on each other
    for peak, top, name in sorted(named, key=lambda point: -point[1]):
        height = min(top, height - gap)
        line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5}
        axes.annotate(name, (peak, top), (peak * 1.2, height), va="center", fontsize=8, arrowprops=line)
    for marker, label in (("o", "without codes"), ("v", "quant=tiny, 8 chunks")):
        axes.plot([], [], marker, color="black", label=label)
    axes.set(xscale="log", xlabel=f"predicted peak of a step, {backbone}, batch 64, MiB", ylabel="mean test top-1, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    report(load(Path(sys.argv[1])), Path(sys.argv[1]), *(sys.argv[2:] or ["vit_b"]))
