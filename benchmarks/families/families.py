"""Every model family of timm through every method and every way to keep activations, with random weights.

    python benchmarks/families/families.py [FAMILY ...] [--workers 2]

Of each family the smallest model, on a CPU: one step of each method, with the gradients of several `quant=` against
stock PyTorch's (in float64 where they should be the same); the layouts of hidden states against the widths of the
blocks' own layers; what is kept for the backward pass, predicted; and predicted peaks against those of the same step on
real tensors. A family is done in a process of its own, at the smallest image size that its model takes (memory: at the
model's own). Writes families.json beside it, where families that are not named stay as they are, and the table
docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from families_report import EXACT_ERROR, LOW, table
from omegaconf import DictConfig
from torch import Tensor, nn

from s2a_cli import backbones, memory
from s2a_cli.activations.chunk_sizes import BY_DEVICE
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import first_line
from s2a_cli.config.compose import compose
from s2a_cli.methods import STRUCTURES, Attachment
from s2a_cli.training import forecast, run
from s2a_cli.training.environment import environment
from s2a_cli.training.step import Step, make_optimizer, moving_norms, train_mode

RESULTS = Path(__file__).parent
TABLE = Path(__file__).parents[2] / "docs" / "families.md"
SIZES = (64, 96, 112, 128, 160, 192, 224, 256)  # pixels that are tried
BATCH, CLASSES = 4, 10
EXACT = {  # quant settings under which gradients are stock's, but for rounding
    "lossless": ["quant=exact"],
    "recomputed": ["quant=none", "quant.recompute=block", "quant.chunks=8"],
}
CODED = {"int4": ["quant=int4"], "tiny": ["quant=tiny"]}
TRACKED = (("bias", "quant=none"), ("bias", "quant=int4"), ("s2a", "quant=tiny"))
Row = dict[str, Any]


def smallest(family: str) -> str:
    """The model of a family with the fewest parameters."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters())
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError):
            continue  # needs a package that is not here
    return min(sizes, key=sizes.__getitem__)


def configured(model: str, method: str, size: int | None, *words: str) -> DictConfig:
    own = [f"backbone.name={model}", f"backbone.timm={model}", "backbone.pretrained=false", f"method={method}"]
    own += [f"backbone.image_size={size}"] if size else []
    return compose(["backbone=timm", "dataset=digits", f"optim.batch_size={BATCH}", *own, *words])


def size_of(model: str) -> int:
    """The smallest size that the model takes."""
    for size in SIZES:
        try:
            return backbones.build(configured(model, "linear", size).backbone, CLASSES, meta=True).image.size
        except UserError:
            continue
    return backbones.build(configured(model, "linear", None).backbone, CLASSES, meta=True).image.size


def randomise(model: nn.Module) -> None:
    """Weights and statistics as of a trained model: no zero gammas, no unit variances; and no dropout."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim <= 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.data = torch.rand(buffer.shape, generator=generator) + 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def made(model: str, method: str, size: int) -> Attachment:
    backbone = backbones.build(configured(model, method, size).backbone, CLASSES)
    randomise(backbone.model)
    attached = run.attach(configured(model, method, size, "quant=none"), backbone)
    for layer in backbone.head.layers.values():
        nn.init.normal_(cast(Tensor, layer.weight), std=0.05)
    train_mode(backbone.model)
    return attached


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, size, size, generator=generator), torch.arange(BATCH) % CLASSES


def gradient(attached: Attachment, config: DictConfig, images: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Of everything that trains, zero where a parameter is not used.

    Raises ValueError where it is not finite, or zero altogether.
    """
    attached.model.to(dtype).zero_grad(set_to_none=True)
    step = Step(config, torch.device("cpu"), attached)
    step.dtype = dtype
    torch.manual_seed(0)
    step.losses(attached.model, images, targets).sum().backward()
    found = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in attached.model.parameters()
            if p.requires_grad
        ]
    )
    attached.model.zero_grad(set_to_none=True)
    if not found.isfinite().all() or not found.any():
        raise ValueError("the gradient is not finite, or zero")
    return found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def cosine(found: Tensor, right: Tensor) -> float:
    chunks = ((a.double(), b.double()) for a, b in zip(found.split(1 << 24), right.split(1 << 24)))
    sums = sum((torch.stack([a @ b, a @ a, b @ b]) for a, b in chunks), start=torch.zeros(3, dtype=torch.float64))
    both, one, other = sums.tolist()
    return both / math.sqrt(one * other)


def controls(row: Row, attached: Attachment, stock: DictConfig, images: Tensor, targets: Tensor, right: Tensor) -> Row:
    """What rounding alone does to stock PyTorch's gradient, where ours is off: random weights may amplify it without
    bound.
    """
    if right.dtype == torch.float64 and any(isinstance(row[name], float) and row[name] > EXACT_ERROR for name in EXACT):
        each = [gradient(attached, stock, x, y, torch.float64) for x, y in zip(images.split(1), targets.split(1))]
        return {"stock, image by image": error(sum(each, start=torch.zeros_like(right)) / len(each), right)}
    if right.dtype == torch.float32 and any(isinstance(row[name], float) and row[name] < LOW for name in CODED):
        return {"stock, bf16": cosine(gradient(attached, stock, images, targets, torch.bfloat16), right)}
    return {}


def methods_of(model: str, size: int) -> Row:
    """{method: {quant: error or cosine of its gradient}, or what is said}."""
    images, targets = batch(size)
    BY_DEVICE["cpu"] = replace(BY_DEVICE["cpu"], block=1, recomputed=1)  # pieces however small
    rows: Row = {}
    for method in STRUCTURES:
        try:
            attached = made(model, method, size)
            row: Row = {"trained": sum(p.numel() for p in attached.model.parameters() if p.requires_grad)}
            rows[method] = row
            stock = configured(model, method, size, "quant=none")
            for kind, ways in (
                (torch.float64, EXACT),
                (torch.float32, CODED),
            ):  # rounding in fp32 moves what lies at a ReLU's corner
                right = gradient(attached, stock, images, targets, kind)
                for name, words in ways.items():
                    whole = (
                        ["quant.chunks=1"] if name == "int4" and moving_norms(attached.model) else []
                    )  # their statistics are the batch's
                    config = configured(model, method, size, *words, *whole)
                    try:
                        run.attach(config, backbones.build(config.backbone, CLASSES, meta=True))
                        found = gradient(attached, config, images, targets, kind)
                    except UserError as refused:
                        row[name] = first_line(refused)
                        continue
                    row[name] = error(found, right) if ways is EXACT else cosine(found, right)
                    del found
                row |= controls(row, attached, stock, images, targets, right)
                del right
            attached.model.float()
            before = {name: t.clone() for name, t in attached.model.state_dict().items()}
            config = configured(model, method, size)
            Step(config, torch.device("cpu"), attached)(
                attached.model, make_optimizer(config.optim, attached.model, attached), images, targets
            )
            tensors = dict([*attached.model.named_parameters(remove_duplicate=False), *attached.model.named_buffers()])
            frozen = [name for name, tensor in tensors.items() if not tensor.requires_grad] if method != "full" else []
            row["changed though frozen"] = [
                name for name in frozen if name in before and not torch.equal(tensors[name], before[name])
            ]
        except Exception as problem:  # one model must not end the table
            rows[method] = f"{type(problem).__name__}: {first_line(problem)}"
            if not isinstance(problem, UserError):
                traceback.print_exc()
    return rows


def layouts_of(model: str) -> Row:
    """The blocks, and those none of whose own layers takes as many channels as their hidden state has."""
    backbone = backbones.build(configured(model, "linear", None).backbone, CLASSES, meta=True)
    found: Row = {"blocks": len(backbone.block_modules), "head": len(backbone.head.layers)}
    try:
        found["layouts"] = dict(Counter(block.output.layout for block in backbone.blocks))
    except UserError as unknown:
        return found | {"layouts": first_line(unknown), "wrong": []}
    wrong = []
    for block in backbone.blocks:
        widths = {width for module in block.module.modules() if (width := taken(module))}
        if widths and block.input.channels not in widths:
            wrong.append(f"{block.name}: {block.input} has widths {sorted(widths)}")
    return found | {"wrong": wrong}


def taken(module: nn.Module) -> int | None:
    """How many channels a layer takes; None for what does not say."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return next(
        (
            getattr(module, name)
            for name in ("in_features", "in_channels", "num_features", "num_channels")
            if hasattr(module, name)
        ),
        None,
    )


def kept_of(model: str) -> Row:
    """MiB kept an image of the model's own size, bias tuning, predicted."""
    kept = {}
    for quant in ("none", "int4", "tiny"):
        config = configured(model, "bias", None, f"quant={quant}")
        backbone = backbones.build(config.backbone, CLASSES, meta=True)
        attached = run.attach(config, backbone)
        kept[quant] = forecast.predict_step(attached, config, BATCH).kept_mib / BATCH
    return kept


def tracked_of(model: str, size: int) -> Row:
    """Predicted peaks as shares of those of the same step on real tensors."""
    shares = {}
    for method, quant in TRACKED:
        config = configured(model, method, size, quant)
        attached = made(model, method, size)
        predicted = forecast.predict_step(attached, config, BATCH)
        step = Step(config, torch.device("cpu"), attached)
        real = memory.track(
            attached.model,
            batch(size),
            step,
            partial(make_optimizer, config.optim, attached=attached),
        )
        shares[f"{method} {quant.removeprefix('quant=')}"] = predicted.peak_mib / real.peak_mib
    return shares


def family_row(family: str) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = smallest(family)
    row: Row = {"family": family, "model": model}
    for name, find in (
        ("size", lambda: size_of(model)),
        ("structure", lambda: layouts_of(model)),
        ("kept", lambda: kept_of(model)),
        ("tracked", lambda: tracked_of(model, row["size"])),
        ("methods", lambda: methods_of(model, row["size"])),
    ):
        try:
            row[name] = find()
        except Exception as problem:  # one figure must not end the table
            row[name] = f"{type(problem).__name__}: {first_line(problem)}"
            traceback.print_exc()
    return row


def in_process(family: str) -> Row:
    asked = subprocess.run([sys.executable, __file__, family, "--one"], capture_output=True, text=True, timeout=3600)
    lines = asked.stdout.splitlines()
    if asked.returncode or not lines:
        killed = (
            "killed: its gradients in float64 take more memory than this machine has"
            if asked.returncode == -signal.SIGKILL
            else ""
        )
        return {
            "family": family,
            "model": None,
            "failed": killed or (asked.stderr.strip().splitlines() or ["ended without a word"])[-1],
        }
    return json.loads(lines[-1]) | {"stderr": asked.stderr.strip().splitlines()[-1:] if asked.stderr.strip() else []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--one", action="store_true", help="print the row of one family as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(family_row(args.families[0])))
        return
    file = RESULTS / "families.json"
    families, rows, started = args.families or timm.list_modules(), {}, time.monotonic()
    if args.families and file.exists():
        rows = {row["family"]: row for row in json.loads(file.read_text())["rows"]}
    with Progress("families", len(families), " families") as progress, ThreadPoolExecutor(args.workers) as pool:
        for row in pool.map(in_process, families):
            rows[row["family"]] = row
            progress.add(1, family=row["family"])
            result = {"environment": environment("cpu"), "rows": [rows[family] for family in sorted(rows)]}
            atomic_write(file, json.dumps(result, indent=1) + "\n")
    print(f"{len(families)} families in {time.monotonic() - started:.0f} s")
    atomic_write(TABLE, table(result))


if __name__ == "__main__":
    main()
