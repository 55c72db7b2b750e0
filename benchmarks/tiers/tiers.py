"""Memory, speed and gradients of ways to fine-tune a backbone, each beside full fine-tuning: ours and those to compare
with.

    python benchmarks/tiers/tiers.py backbone=vit_b batch=64 precision=fp32
    python benchmarks/tiers/tiers.py backbone=vit_t batch=32 backbone.image_size=112 checkpoint=vit_tiny.safetensors
    data=photos

Writes OUT/NAME.json, .md and, where matplotlib is installed, .png. Words with a key of `Options` are read here, others
are settings of the runs. Without CUDA memory is predicted and says so, and speed is that of the CPU; with CUDA memory
is measured, each row in a process of its own, beside the prediction. Speed: all rows in one process, one step each in
an order drawn anew every round; medians. A row that can't run says why. OMP_NUM_THREADS sets the CPU's threads.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import random
import subprocess
import sys
import typing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from kernel_check import check_kernels
from PIL import Image
from rows import (
    BY_NAME,
    CLASSES,
    ROWS,
    Batch,
    Entry,
    Made,
    Row,
    blank,
    gradients,
    noise,
    predicted,
    problems,
    take_steps,
)
from speed import time_rows
from tiers_report import figure, markdown
from torch import Tensor

from s2a_cli import memory
from s2a_cli.backbones import Head
from s2a_cli.common import files as files_module
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import nearest
from s2a_cli.config.compose import compose
from s2a_cli.data import build_transform
from s2a_cli.data.transforms import ImageConfig
from s2a_cli.results import run_folder
from s2a_cli.training import environment as environment_module
from s2a_cli.training.loop import WARMUP_STEPS
from s2a_cli.training.run import choose_device

MEASURED_STEPS = 3  # of memory, after the warm-up
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class Options:
    batch: int = 64  # images a step, of memory
    rows: str = "all"  # or names with commas between them; full is always there
    predict: bool = True
    gradients: bool = True
    time: bool = True
    time_batch: int | None = None  # images a step, of speed; null: batch on CUDA, at most 8 on a CPU
    steps: int | None = None  # timed for each row; null: 20 on CUDA, 5 on a CPU
    gradient_batch: int = 8  # images whose gradient is compared
    checkpoint: str | None = None  # pretrained weights; null: random ones, unless the backbone ships with some
    data: str | None = None  # a folder of class folders of photos for gradients; null: noise
    out: str = "benchmarks/tiers"
    name: str | None = None  # of the files; null: from backbone, image size, batch, precision and device
    measure: str | None = None  # one row's memory on CUDA, printed as JSON: what each process of its own is told


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """Our options, and the words that are settings of the runs. Raises UserError for options that can't be read."""
    hints, given, words = typing.get_type_hints(Options), {}, []
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in hints:
            words.append(word)
        elif hints[key] is bool:
            if value not in ("true", "false"):
                raise UserError(f"{word}: expected true or false")
            given[key] = value == "true"
        elif hints[key] in (int, int | None):
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"{word}: expected an integer of at least 1")
            given[key] = int(value)
        else:
            given[key] = value
    options = Options(**given)
    words.append(f"optim.batch_size={options.batch}")
    if options.checkpoint:
        words.append(f"backbone.checkpoint={options.checkpoint}")
    elif compose(words).backbone.checkpoint is None:
        words.append("backbone.pretrained=false")
    return options, words


def chosen(names: str) -> list[Row]:
    """Rows in the order of `ROWS`, full fine-tuning first."""
    wanted = set(BY_NAME) if names == "all" else {"full", *names.split(",")}
    for name in sorted(wanted - BY_NAME.keys()):
        raise UserError(f"rows={names}: no row {name!r}{nearest(name, BY_NAME)}; there are {', '.join(BY_NAME)}")
    return [row for row in ROWS if row.name in wanted]


# Memory


def as_entry(found: memory.Memory) -> dict[str, Any]:
    keys = ("kind", "kept_mib", "static_mib", "peak_mib", "reserved_mib")
    values = {key: value for key, value in found.as_dict().items() if key in keys and value is not None}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def predict_row(entry: Entry, words: list[str], batch: int) -> None:
    with problems(entry, "memory"):
        entry["predicted"] = as_entry(predicted(BY_NAME[entry["name"]], words, batch))
        if entry["predicted"]["peak_mib"] is None:
            entry["problems"]["peak"] = "not predicted: the compiler orders and fuses what it computes again"


def measure_row(entry: Entry, argv: list[str]) -> None:
    """Runs this file in a process of its own."""
    with problems(entry, "measured"):
        command = [sys.executable, __file__, *argv, f"measure={entry['name']}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(said[-1].strip() if said else f"the process ended with code {done.returncode}")
        entry["measured"] = json.loads(done.stdout.splitlines()[-1])


def measured(row: Row, words: list[str], batch: int, device: torch.device, meter: memory.CudaMeter) -> dict[str, Any]:
    """The memory of a row's steps as the meter counts it. Raises UserError when others use the device."""
    if not memory.is_idle(device):
        raise UserError(f"{device} is not idle: other processes hold memory on it, so nothing is measured")
    made = Made(row, words, device)
    made.compile()
    optimizer, host = made.optimizer(), noise(made.backbone.image.size, batch)
    take_steps(made, optimizer, host, meter, WARMUP_STEPS + MEASURED_STEPS)
    assert meter.memory, "steps after the warm-up were measured"
    return as_entry(meter.memory)


# Gradients


def photos(folder: str, config: Any, image: ImageConfig, count: int) -> Batch:
    """Evaluation's view of photos from all over a folder, shuffled, always the same; targets are their class
    folders.
    """
    files = sorted(file for file in Path(folder).expanduser().rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < count:
        raise UserError(f"data={folder}: {len(files)} photos found, at least {count} are needed")
    files = [files[i * len(files) // count] for i in range(count)]
    random.Random(0).shuffle(files)
    classes = sorted({file.parent.name for file in files})
    view = build_transform(image, config.dataset, train=False)
    images = torch.stack([view(Image.open(file).convert("RGB")) for file in files])
    return images, torch.tensor([classes.index(file.parent.name) % CLASSES for file in files])


def compare_gradients(entries: list[Entry], words: list[str], options: Options, device: torch.device) -> None:
    """Of each row, against exact bias tuning's, over the parameters that both train; codes were fitted to other
    images.
    """
    count, exact = 2 * options.gradient_batch, Made(BY_NAME["bias"], words, device)
    image = exact.backbone.image
    images, targets = photos(options.data, exact.config, image, count) if options.data else noise(image.size, count)
    batches = list(zip(images.split(options.gradient_batch), targets.split(options.gradient_batch)))
    reference, head = gradients(exact, batches), exact.backbone.head
    del exact
    with Progress("gradients", len(entries), " rows") as progress:
        for entry in entries:
            with problems(entry, "gradient"):
                made = Made(BY_NAME[entry["name"]], words, device)
                entry["parameters"] = made.backbone.count()
                made.compile()
                found = gradients(made, batches)
                entry["gradient"] = compared(found, reference, head)
            made = None
            progress.add(1, row=entry["name"])


def compared(found: dict[str, Tensor], exact: dict[str, Tensor], head: Head) -> dict[str, Any]:
    shared = [name for name in exact if name in found]
    a, b = (torch.cat([grads[name] for name in shared]) for grads in (found, exact))
    return {
        "cosine": torch.nn.functional.cosine_similarity(a, b, 0).item(),
        "error": ((a - b).norm() / b.norm()).item(),
        "elements": a.numel(),
        "head_only": all(map(head.holds, shared)),
    }


# The result


def time_batch(options: Options, device: torch.device) -> int:
    return options.time_batch or (options.batch if device.type == "cuda" else min(options.batch, 8))


def with_ratios(entries: list[Entry]) -> None:
    """How many times less memory, and more images a second, than full fine-tuning."""
    full = entries[0]

    def ratio(above: Any, below: Any) -> float | None:
        return above / below if above and below else None

    for entry in entries:
        entry["ratios"] = {"images_per_second": ratio(entry["images_per_second"], full["images_per_second"])}
        for kind in ("predicted", "measured"):
            mine, whole = entry[kind] or {}, full[kind] or {}
            for key in ("kept_mib", "peak_mib"):
                entry["ratios"][f"{kind}_{key.removesuffix('_mib')}"] = ratio(whole.get(key), mine.get(key))


def environment(device: torch.device) -> dict[str, Any]:
    cpu = [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith("model name")]
    versions = {}
    for package in ("peft", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    machine = {"cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "cuda": torch.version.cuda}
    return environment_module.environment(str(device)) | machine | versions


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def benchmark(argv: list[str]) -> dict[str, Any]:
    """The content of the result file. Raises UserError for settings that fit no row."""
    options, words = parse(argv)
    entries = [blank(row) for row in chosen(options.rows)]
    config = compose(words)
    cuda = config.device != "cpu" and torch.cuda.is_available()  # makes no context: the rows' own processes come first
    with Progress("memory", len(entries), " rows") as progress:
        for entry in entries:
            if options.predict:
                predict_row(entry, words, options.batch)
            if cuda:
                measure_row(entry, argv)
            progress.add(1, row=entry["name"])
    device = choose_device(config.device if cuda else "cpu")
    if options.gradients:
        compare_gradients(entries, words, options, device)
    if options.time:
        steps = options.steps or (20 if device.type == "cuda" else 5)
        time_rows(entries, words, time_batch(options, device), steps, device)
    with_ratios(entries)
    made = Made(BY_NAME["linear"], words, torch.device("cpu"), meta=True)
    return {
        "benchmark": "tiers",
        "command": " ".join(["python benchmarks/tiers/tiers.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "backbone": config.backbone.name,
        "timm": config.backbone.timm,
        "image_size": made.backbone.image.size,
        "precision": config.precision,
        "optimizer": config.optim.name,
        "attention": "fused where timm's is, but in rows that say unfused",
        "batch": options.batch,
        "time_batch": time_batch(options, device) if options.time else None,
        "gradient_batch": options.gradient_batch if options.gradients else None,
        "weights": Path(config.backbone.checkpoint).name if config.backbone.checkpoint else "random",
        "images": f"photos of {Path(options.data).name}" if options.data else "noise",
        "environment": environment(device),
        "kernels": check_kernels(words, device) if cuda else None,
        "rows": entries,
    }


def main(argv: list[str]) -> None:
    options, words = parse(argv)
    if options.measure:
        device = choose_device("cuda")
        meter = memory.CudaMeter(device, WARMUP_STEPS)
        print(json.dumps(measured(BY_NAME[options.measure], words, options.batch, device, meter)))
        return
    result = benchmark(argv)
    out = run_folder.make_run_dir(Path(options.out))
    device = "_cuda" if any(row["measured"] for row in result["rows"]) else ""
    name = f"{result['backbone']}_{result['image_size']}px_b{result['batch']}_{result['precision']}{device}"
    path = out / (options.name or name)
    table = markdown(result)
    print(table)
    files_module.atomic_write(path.with_name(f"{path.name}.json"), json.dumps(result, indent=1) + "\n")
    files_module.atomic_write(path.with_name(f"{path.name}.md"), table)
    if options.time:
        figure(result, path.with_name(f"{path.name}.png"))
    print(f"{path}.json", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
