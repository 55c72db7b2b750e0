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
    energy = any(row.get("joules") for row in result["rows"])
    head = ["row", *columns, "images/s", *(["joules a step"] if energy else []), "gradient: cosine", "relative error"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [f"{row['title']} (`{row['name']}`)"]
        for kind in kinds:
            for part in ("kept", "peak"):
                value = (row[kind] or {}).get(f"{part}_mib")
                cells.append(times(value and f"{value:,.{1 if value < 100 else 0}f}", row["ratios"][f"{kind}_{part}"]))
        speed = row["images_per_second"]
        cells.append(times(speed and f"{speed:,.2f}", row["ratios"]["images_per_second"]))
        if energy:
            cells.append(f"{row['joules']:.3g}" if row.get("joules") else "")
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


# Rows of one means of saving memory, the least of it first.
CURVES: dict[str, tuple[str, ...]] = {
    "full: micro-batches": ("full", "full-micro8"),
    "full: timm's checkpointing": ("full-ckpt", "full-ckpt-micro8"),
    "linear probe": ("linear",),
    "LoRA: micro-batches": ("lora", "lora-micro4"),
    "bias: micro-batches": ("bias", "bias-micro16", "bias-micro8", "bias-micro4", "bias-micro2", "bias-micro1"),
    "bias: micro-batches in CUDA graphs": ("bias-micro4-graph",),
    "bias: timm's checkpointing": ("bias-ckpt", "bias-ckpt-micro16"),
    "bias: selective checkpointing": ("bias-selective",),
    "bias: the compiler's budget": ("bias-budget0.3", "bias-budget0.1"),
    "bias: save_on_cpu": ("bias-offload",),
    "bias: blocks recomputed in pieces": ("bias-recompute", "bias-recompute8"),
    "bias: codes of 5 and 4 bits": ("T2", "T2-int4", "T2-int4-micro8"),
    "bias: quant=tiny": ("T3", "T3-micro16", "T3-8", "T5-T3-int8", "T5-T3-nf4"),
    "s2a: micro-batches": ("s2a", "s2a-micro4"),
    "s2a: codes": ("T2-s2a", "T3-s2a", "T3-s2a-8"),
    "side": ("side", "T4", "T4-8", "T5-T4-int8", "T5-T4-nf4"),
}
OURS = tuple(CURVES)[-6:]


def figure(result: Result, path: Path) -> None:
    """Images a second over peak memory, a curve a means of saving memory."""
    kind = "measured" if result["rows"][0]["measured"] else "predicted"
    points = {
        row["name"]: (peak, row["images_per_second"])
        for row in result["rows"]
        if (peak := (row[kind] or {}).get("peak_mib")) and row["images_per_second"]
    }
    title = f"{result['backbone']}, {result['image_size']} px, {result['precision']}"
    speed = f"images a second ({result['environment']['device']}, batch {result['time_batch']})"
    draw(points, path, title, f"peak memory of a step of {result['batch']} images, MiB ({kind})", speed)


def draw(points: dict[str, tuple[float, float]], path: Path, title: str, memory: str, speed: str) -> None:
    """Draws {row: (peak MiB, images a second)} as curves, and the front of all; nothing where there are no points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} needs a package that is not here: pip install matplotlib", file=sys.stderr)
        return
    if not points:
        return
    drawn = Figure(figsize=(11, 6), layout="constrained")
    axes = drawn.add_subplot()
    for number, (label, names) in enumerate(CURVES.items()):
        found = sorted(points[name] for name in names if name in points)
        if found:
            style: Any = {"lw": 1.8, "marker": "o"} if label in OURS else {"lw": 1, "ls": "--", "marker": "x", "ms": 5}
            axes.plot(*zip(*found, strict=True), color=f"C{number % 10}", label=label, **style)
    front = pareto(list(points.values()))
    axes.plot(*zip(*front, strict=True), color="black", lw=0.8, ls=":", drawstyle="steps-post", label="best of all")
    axes.set(xscale="log", xlabel=memory, ylabel=speed, title=title)
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(lambda value, position: f"{value:,.0f}")
    axes.grid(alpha=0.3, which="both")
    drawn.legend(loc="outside right upper", fontsize=8, title="solid: this package's codes, pieces and branch")
    drawn.savefig(path, dpi=130)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(memory, speed) of those than which none is both smaller and faster, by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front
