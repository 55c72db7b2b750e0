"""The page and the figure of budgets.py, made of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

WANTED, WANTED_OF_CHECKPOINTING = 0.97, 1.15


def markdown(result: dict[str, Any]) -> str:
    """Returns the figures as a page."""
    batch = result["batch"]
    head = [
        "budget",
        "plan",
        "peak, MiB",
        "images/s",
        "best row that fits",
        "of it",
        "of checkpointing",
        "planned in, s",
    ]
    lines = [
        [
            line["budget"],
            line["plan"],
            f"{line['peak_mib']:,.0f}",
            f"{line['rate']:.2f}",
            line["best"] or "none",
            _times(line["of_best"]),
            _times(line["of_checkpointing"]),
            f"{line['planning_seconds']:.0f}",
        ]
        for line in result["budgets"]
    ]
    every = sorted(result["rows"], key=lambda row: row["peak_mib"])
    listed = [[row["name"], f"{row['peak_mib']:,.0f}", row["shown"]] for row in every]
    return "\n".join(
        [
            f"# Plans for a memory budget: {result['name']}",
            "",
            f"`python benchmarks/planner/budgets.py {' '.join(result['words'])}`, {result['machine']},"
            f" {result['date']}. Peaks are predicted. Images a second: medians of {result['steps']} steps of a batch"
            f" of {batch}, cut to some {result['timed']} images where micro-batches are smaller, rows and plans in"
            " alternating order, each step in a process of its own; in brackets at first sight alone, from one step,"
            " where others that fit were clearly faster. Wanted:"
            f" {WANTED} of the best row that fits, and"
            f" {WANTED_OF_CHECKPOINTING} times the images a second of exact checkpointing of whole blocks.",
            "",
            tabulate(lines, head, tablefmt="github", disable_numparse=True),
            "",
            "## All rows",
            "",
            tabulate(listed, ["row", "peak, MiB", "images/s"], tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def figure(result: dict[str, Any], path: Path) -> None:
    """Draws images a second over the predicted peak: one curve a means, in micro-batches of every size, and plans."""
    means: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        means.setdefault(row["name"].split(", ")[0], []).append(row)
    if not means:
        return
    drawn = Figure(figsize=(9, 6), layout="constrained")
    axes = drawn.add_subplot()
    for index, (name, rows) in enumerate(means.items()):
        rows = sorted(rows, key=lambda row: row["peak_mib"])
        rates = [float(row["shown"].strip("()")) for row in rows]
        axes.plot([row["peak_mib"] for row in rows], rates, marker="os^Dv<>P"[index % 8], label=name, alpha=0.8)
    lines = sorted(result["budgets"], key=lambda line: line["peak_mib"])
    style: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 13, "linestyle": ":", "zorder": 5}
    axes.plot([line["peak_mib"] for line in lines], [line["rate"] for line in lines], label="plans", **style)
    axes.set_xscale("log")
    ticks = [200, 300, 400, 600, 800, 1200, 2000, 3000, 5000, 8000]
    least, most = (edge(row["peak_mib"] for row in result["rows"]) for edge in (min, max))
    axes.set_xticks([tick for tick in ticks if 0.7 * least <= tick <= 1.5 * most], minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set(xlabel="predicted peak, MiB", ylabel=f"images a second, {result['machine']}", title=result["name"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawn.savefig(path, dpi=150)
