"""Measures what CUDA graphs are worth: images a second and memory of a step, launched kernel by kernel and replayed.

    python benchmarks/cuda/graphs.py [key=value ...] [--rows NAME...] [--out graphs.json] [--minutes 5]
    python benchmarks/cuda/graphs.py --page FILE.json...    # its page and figure again, with what is predicted

Each row of ../tiers/rows.py, by default those of ROWS below, steps with and without cuda_graphs=true: ViT-B at 224 px
with random weights, 64 images, bf16, unless key=value says otherwise. Time is that of whole steps with the update,
images are there already. Losses of both must agree. Written to OUT after every row, as JSON, as a table and as a figure
beside it; rows for which no time is left are named. Peaks are those of steps that are not replayed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tiers"), str(Path(__file__).parents[2])]

import torch
from rows import BY_NAME, Made, Row, noise, predicted
from tabulate import tabulate
from tiers import environment
from tiers_report import draw

from s2a_cli.common import files
from s2a_cli.common.text import first_line
from s2a_cli.memory.result import MIB
from s2a_cli.training.cuda_graphs import own_stream
from s2a_cli.training.run import choose_device, no_graphs
from s2a_cli.training.step import LAUNCHED

ROWS = (
    *("bias", "T2-int4", "T3", "T3-s2a", "T4", "bias-micro4", "bias-recompute", "full", "s2a", "side", "T2-s2a"),
    *("bias-micro8", "bias-micro16", "bias-micro2", "bias-micro1", "s2a-micro4", "T3-micro16", "T2-int4-micro8"),
    *("exact", "T1", "bias-recompute8", "T3-8", "T3-s2a-8", "T2", "lora", "lora-micro4", "linear", "full-micro8"),
    *("T5-T3-int8", "segments-int4", "bias-ckpt", "bias-ckpt-micro16", "bias-selective"),
)
WORDS = ["backbone=vit_b", "backbone.pretrained=false", "precision=bf16"]
FITTED = 20  # passes, after which codes are fitted and graphs captured
TIMED, LONGEST = 10, 3.0  # steps at most, and seconds
KINDS = ("eager", "graphs")
Entry = dict[str, Any]


class Steps:
    """Takes steps of a row on one batch of noise, with graphs or without."""

    def __init__(self, row: Row, words: list[str], batch: int, graphs: bool, device: torch.device):
        self.made = Made(row, [*words, f"cuda_graphs={str(graphs).lower()}"], device)
        self.optimizer = self.made.optimizer()
        images, targets = noise(self.made.backbone.image.size, batch)
        self.batch = images.to(device, self.made.step.dtype), targets.to(device)
        self.losses: list[float] = []

    def __call__(self) -> torch.Tensor:
        return self.made(self.made.model, self.optimizer, *self.batch)

    def measured(self) -> Entry:
        """Returns images a second, MiB, and the losses of the first steps."""
        micro_batches = -(-len(self.batch[0]) // (self.made.config.optim.micro_batch or len(self.batch[0])))
        losses = [self().item() for _ in range(max(LAUNCHED + 3, FITTED // micro_batches))]
        torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < TIMED and sum(seconds) < LONGEST:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            self()
            ended.record()
            ended.synchronize()
            seconds.append(begun.elapsed_time(ended) / 1000)
        return {
            "images_per_second": len(self.batch[0]) / median(seconds),
            "peak_mib": torch.cuda.max_memory_allocated() / MIB,
            "reserved_mib": torch.cuda.memory_reserved() / MIB,
            "losses": losses,
        }


def measured(row: Row, words: list[str], batch: int, device: torch.device, kinds: list[str]) -> Entry:
    """Measures a row without graphs and with them."""
    entry: Entry = {"name": row.name, "title": row.title, "batch": batch} | {kind: {} for kind in KINDS}
    for kind in kinds:
        gc.collect()
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
        try:
            with own_stream(device) if kind == "graphs" else nullcontext():
                steps = Steps(row, words, batch, kind == "graphs", device)
                refused = no_graphs(steps.made.config, steps.made.attached, device) if kind == "graphs" else None
                entry[kind] = {"problem": refused} if refused else steps.measured()
        except Exception as error:  # the other rows go on
            entry[kind] = {"problem": f"{type(error).__name__}: {first_line(error)}"}
        steps = None
    return entry


def predict(row: Row, words: list[str], entry: Entry) -> None:
    """Notes the peaks that are predicted for a row, where it was measured."""
    for kind in KINDS:
        if entry[kind].get("images_per_second") and "predicted_mib" not in entry[kind]:
            graphs = f"cuda_graphs={str(kind == 'graphs').lower()}"
            entry[kind]["predicted_mib"] = predicted(row, [*words, graphs], entry["batch"]).peak_mib


def table(result: Entry) -> str:
    """Returns the result as a page."""
    head = ("row", "images/s", "replayed", "times", "peak, MiB", "predicted", "reserved", "replayed", "loss differs by")
    lines = []
    for entry in result["rows"]:
        eager, graphs = entry["eager"], entry["graphs"]
        speeds = [kind.get("images_per_second") for kind in (eager, graphs)]
        times = f"{speeds[1] / speeds[0]:.2f}" if all(speeds) else ""
        apart = max((abs(a - b) for a, b in zip(eager.get("losses", ()), graphs.get("losses", ()))), default=None)
        figures = (
            eager.get("peak_mib"),
            eager.get("predicted_mib"),
            eager.get("reserved_mib"),
            graphs.get("reserved_mib"),
        )
        shown = [f"{value:,.0f}" if value else "" for value in (*speeds, *figures)]
        lines.append([entry["title"], *shown[:2], times, *shown[2:], "" if apart is None else f"{apart:.1g}"])
    about = result["environment"]
    problems = [
        f"- {entry['title']}, {kind}: {entry[kind]['problem']}"
        for entry in result["rows"]
        for kind in KINDS
        if entry[kind].get("problem")
    ]
    left = [f"- no time was left for: {', '.join(result['left'])}"] if result["left"] else []
    return "\n".join(
        [
            f"# CUDA graphs on {about['device']}",
            "",
            f"`{result['command']}`, torch {about['torch']}, {result['date']}. Steps of {result['batch']} images.",
            "",
            tabulate(lines, head, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 8)),
            "",
            *problems,
            *left,
            "",
        ]
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="NAME")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "graphs.json")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--page", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_intermixed_args(argv)
    for path in args.page or ():
        write(json.loads(path.read_text()), path)
    if args.page:
        return 0
    until, device = time.monotonic() + 60 * args.minutes, choose_device("cuda")
    result: Entry = {
        "command": " ".join(["python benchmarks/cuda/graphs.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(device),
        "batch": args.batch,
        "words": args.words,
        "rows": [],
        "left": list(args.rows),
    }
    words = [*WORDS, *args.words]
    for name in args.rows:
        if time.monotonic() > until:
            break
        result["rows"].append(measured(BY_NAME[name], words, args.batch, device, args.kinds))
        result["left"].remove(name)
        shown = {kind: result["rows"][-1][kind].get("images_per_second") for kind in KINDS}
        print(f"{name}: {shown} {[result['rows'][-1][kind].get('problem') for kind in shown]}", flush=True)
        files.atomic_write(args.out, json.dumps(result, indent=1) + "\n")
        files.atomic_write(args.out.with_suffix(".md"), table(result))
    write(result, args.out)  # last, since a host that predicts is no idle one
    print(table(result))
    return 0


def write(result: Entry, path: Path) -> None:
    """Predicts what was measured and writes the result, its page and its figure."""
    for entry in result["rows"]:
        predict(BY_NAME[entry["name"]], [*WORDS, *result.get("words", ())], entry)
    files.atomic_write(path, json.dumps(result, indent=1) + "\n")
    files.atomic_write(path.with_suffix(".md"), table(result))
    points = {
        entry["name"]: (found["reserved_mib"], found["images_per_second"])
        for entry in result["rows"]
        if (found := entry["graphs"]).get("images_per_second")
    }
    title = f"Steps replayed as CUDA graphs, {result['batch']} images, on {result['environment']['device']}"
    draw(points, path.with_suffix(".png"), title, "reserved by PyTorch's allocator, MiB (measured)", "images a second")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
