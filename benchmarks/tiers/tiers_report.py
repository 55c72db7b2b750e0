"""The result of benchmarks/tiers/tiers.py to read: a table in markdown, and memory against speed in a figure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """What was run and where, the table, and why rows lack figures."""
    kinds = [kind for kind in ("measured", "predicted") if any(row[kind] for row in result["rows"])]
    columns = [f"{part}, {kind}, MiB" for kind in kinds for part in ("kept", "peak")]
    head = ["row", *columns, "images/s", "gradient: cosine", "relative error"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [f"{row['title']} (`{row['name']}`)"]
        for kind in kinds:
            for part in ("kept", "peak"):
                value = (row[kind] or {}).get(f"{part}_mib")
                cells.append(times(value and f"{value:,.{1 if value < 100 else 0}f}", row["ratios"][f"{kind}_{part}"]))
        speed = row["images_per_second"]
        cells.append(times(speed and f"{speed:,.2f}", row["ratios"]["images_per_second"]))
        gradient = row["gradient"]
        mark = " (head only)" if gradient and gradient["head_only"] else ""
        cells += [f"{gradient['cosine']:.6f}{mark}", f"{gradient['error']:.2g}"] if gradient else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    said = [f"- `{row['name']}`, {what}: {why}" for row in result["rows"] for what, why in row["problems"].items()]
    return "\n".join([heading(result), "", *lines, "", *(["No figure:", "", *said, ""] if said else [])])


def times(value: str | None, ratio: float | None) -> str:
    if value is None:
        return ""
    return f"{value} ({ratio:.2f}x)" if ratio else value


def heading(result: Result) -> str:
    where = result["environment"]
    lines = [
        (
            f"{result['timm']}, {result['image_size']} px, batch {result['batch']}, {result['precision']},"
            f" {result['optimizer']}, weights: {result['weights']}. In brackets: how many times less memory, or more"
            " images a second, than full fine-tuning."
        ),
        (
            f"{result['date']}; {where['device']} ({where['cpu']}, {where['cores']} cores, {where['threads']} threads),"
            f" torch {where['torch']}, timm {where['timm']}, peft {where['peft']}, Python {where['python']}."
        ),
    ]
    if result["time_batch"]:
        lines.append(
            f"Images a second: medians of single steps of {result['time_batch']} images, rows in alternating order."
        )
    if result["gradient_batch"]:
        lines.append(
            f"Gradients: {result['images']}, {result['gradient_batch']} images, against exact bias tuning over the"
            " parameters that both train; codes are fitted to other images."
        )
    if any(row["predicted"] for row in result["rows"]):
        lines.append("Predicted: counted with tensors without data, nothing was measured.")
    return f"# {result['backbone']}\n\n" + "\n".join(lines + [f"\n    {result['command']}"])


def figure(result: Result, path: Path) -> None:
    """Peak memory against images a second, both as multiples of full fine-tuning."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"{path.name} needs a package that is not here: pip install matplotlib", file=sys.stderr)
        return
    kind = "measured" if result["rows"][0]["measured"] else "predicted"
    points = [
        (peak, row["images_per_second"], row["ours"], row["name"])
        for row in result["rows"]
        if (peak := (row[kind] or {}).get("peak_mib")) and row["images_per_second"]
    ]
    if not points:
        return
    fig, ax = plt.subplots(figsize=(9, 6))
    for ours, colour, label in ((False, "tab:gray", "PyTorch, timm, peft"), (True, "tab:blue", "ours")):
        mine = [point for point in points if point[2] == ours]
        ax.scatter([p[0] for p in mine], [p[1] for p in mine], color=colour, label=label, zorder=3)
        for peak, speed, _, name in mine:
            ax.annotate(name, (peak, speed), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
    front = pareto([(peak, speed) for peak, speed, *_ in points])
    ax.plot(
        [p[0] for p in front],
        [p[1] for p in front],
        color="tab:orange",
        lw=1,
        drawstyle="steps-post",
        label="best of all",
    )
    ax.set_xscale("log")
    ax.set_xlabel(f"peak memory of a step of {result['batch']} images, MiB ({kind})")
    ax.set_ylabel(f"images a second ({result['environment']['device']}, batch {result['time_batch']})")
    ax.set_title(f"{result['backbone']}, {result['image_size']} px, {result['precision']}")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(memory, speed) of those than which none is both smaller and faster, by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front
