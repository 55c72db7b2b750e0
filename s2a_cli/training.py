"""Train and evaluate one run: config in, a folder with `result.json` out."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from s2a_cli import backbones, checkpoints, data, memory, records
from s2a_cli.backbones import Backbone
from s2a_cli.errors import RunError, UserError
from s2a_cli.methods import METHODS
from s2a_cli.progress import Progress
from s2a_cli.steps import Step, make_optimizer, weight_dtype

WARMUP_STEPS = 3  # left out of throughput and of measured memory


@dataclass
class Run:
    """What a config stands for, made: its data, its backbone with the method attached, and where it runs."""

    config: DictConfig
    splits: data.Splits
    backbone: Backbone
    statistics: bool  # BatchNorm's running statistics move
    weights: str  # fingerprint of the pretrained tensors
    device: torch.device

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def loader(self, split: str, train: bool = False) -> data.Loader:
        config, dataset = self.config, getattr(self.splits, split)
        return data.loader(
            dataset,
            data.build_transform(self.backbone.image, config.dataset, train),
            config.optim.batch_size,
            seed=config.seed,
            train=train,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )

    def train_mode(self) -> None:
        """Training mode, but BatchNorm on its frozen statistics unless the method moves them."""
        self.model.train()
        if not self.statistics:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def prepare(config: DictConfig) -> Run:
    """Loads the data and the backbone, and attaches the method. Raises UserError for input that does not fit."""
    device = choose_device(config.device)
    splits = data.load(config.dataset)
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, len(splits.classes))
    weights = backbone.fingerprint()
    torch.manual_seed(config.seed)  # the method's initial values do not depend on how the backbone drew its own
    method = METHODS[config.method.name](config.method)
    method.attach(backbone)
    backbone.model.to(device, weight_dtype(config.precision))
    return Run(config, splits, backbone, method.trains_statistics, weights, device)


def choose_device(name: str) -> torch.device:
    """auto takes CUDA where it is. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: not available here ({str(error).splitlines()[0]}); use device=auto or cpu") from None
    return device


def train(config: DictConfig) -> tuple[records.Result, Path]:
    """Trains one run and returns its record and its folder.

    Out of memory and Ctrl-C end in a record with that status, tensors of the best epoch so far saved. Any other failure is
    recorded as `failed` and raised.
    """
    run = prepare(config)
    identity = records.identity(config, run.splits.revision, run.weights)
    folder = records.make_run_dir(
        Path(config.run_dir or f"runs/{run.splits.name}/{config.backbone.name}/{config.method.name}/{identity}")
    )
    result = _blank(run, identity)
    records.atomic_write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    try:
        result["memory"] = predict(run).as_dict()
        _fit(run, folder, result)
        result["status"] = "ok"
    except KeyboardInterrupt:
        result["status"], result["error"] = "interrupted", "interrupted"
    except torch.OutOfMemoryError as error:
        result["status"], result["error"] = "oom", str(error).splitlines()[0]
    except Exception as error:
        out_of_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU's allocator
        result["status"] = "oom" if out_of_memory else "failed"
        result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if not out_of_memory:
            (folder / "traceback.txt").write_text(traceback.format_exc())
            raise
    finally:
        records.write_result(folder, result)
    return result, folder


def _blank(run: Run, identity: str) -> records.Result:
    splits = run.splits
    return {
        "schema": records.SCHEMA,
        "id": identity,
        "status": "failed",
        "error": None,
        "config": OmegaConf.to_container(run.config, resolve=True),
        "accuracy": {"val_top1": None, "test_top1": None, "test_top5": None, "best_epoch": None},
        "parameters": run.backbone.count(),
        "memory": None,
        "throughput": {"train_images_per_second": None},
        "data": {
            "name": splits.name,
            "revision": splits.revision,
            "classes": list(splits.classes),
            "train": len(splits.train),
            "val": len(splits.val),
            "test": len(splits.test),
        },
        "weights": run.weights,
        "environment": records.environment(str(run.device)),
    }


def _fit(run: Run, folder: Path, result: records.Result) -> None:
    """Trains, keeps the tensors of the epoch with the best validation accuracy, tests these once."""
    config, optim = run.config, run.config.optim
    step, optimizer = Step(config, run.device), make_optimizer(optim, run.model)
    loader, validation = run.loader("train", train=True), run.loader("val")
    per_epoch = len(loader)
    schedule = LambdaLR(optimizer, lr_factor(config, per_epoch))
    mix = mixing(config, len(run.splits.classes))
    meter = _meter(run.device)
    board = _tensorboard(folder) if config.tensorboard else None
    rates: list[float] = []
    best, best_state = -1.0, checkpoints.trainable_state(run.model, run.statistics)
    lines: list[str] = []
    with Progress("training", optim.epochs * len(run.splits.train), " images") as progress:
        for epoch in range(1, optim.epochs + 1):
            run.train_mode()
            begun, losses, seen = time.perf_counter(), 0.0, 0
            loader.epoch = epoch
            for index, (images, targets) in enumerate(loader):
                number = (epoch - 1) * per_epoch + index
                torch.manual_seed(data.mix(config.seed, epoch, index))  # dropout and mixing: f(seed, epoch, step)
                started = time.perf_counter()
                if meter:
                    meter.step_begins()
                images, targets = mix(images.to(run.device), targets.to(run.device))
                loss = step(run.model, optimizer, images, targets, *([meter.after_forward] if meter else []))
                loss, count = loss.item(), len(images)  # item() synchronises
                if meter:
                    meter.step_ends()
                del images, targets  # nothing of a step is alive when the next begins
                schedule.step()
                if not math.isfinite(loss):
                    raise RunError(f"the loss is {loss} in epoch {epoch}, step {index + 1}: lower optim.lr={optim.lr}")
                if number >= WARMUP_STEPS:
                    rates.append(count / (time.perf_counter() - started))
                losses, seen = losses + loss * count, seen + count
                progress.add(count, epoch=f"{epoch}/{optim.epochs}", loss=f"{losses / seen:.3f}")
            scores = accuracy(run, validation) if len(run.splits.val) else {}
            if not scores or scores["top1"] > best:
                best = scores.get("top1", best)
                best_state = checkpoints.trainable_state(run.model, run.statistics)
                checkpoints.save(folder, best_state, run.weights)
                result["accuracy"].update(val_top1=scores.get("top1"), best_epoch=epoch)
            line = {
                "epoch": epoch,
                "train_loss": losses / seen,
                "val_loss": scores.get("loss"),
                "val_top1": scores.get("top1"),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - begun,
            }
            lines.append(json.dumps(line) + "\n")
            records.atomic_write(folder / "metrics.jsonl", "".join(lines))
            progress.note(_epoch_line(line, optim.epochs))
            if board:
                for key, value in line.items():
                    if value is not None:
                        board.add_scalar(key, value, epoch)
    if rates:
        result["throughput"]["train_images_per_second"] = statistics.median(rates)
    if meter and meter.memory:
        result["memory"] = meter.memory.as_dict() | {k: v for k, v in result["memory"].items() if k.startswith("full_")}
    checkpoints.restore(run.model, best_state)
    scores = accuracy(run, run.loader("test"))
    result["accuracy"].update(test_top1=scores["top1"], test_top5=scores["top5"])


def _meter(device: torch.device) -> memory.CudaMeter | None:
    """What measures the memory of steps; None where nothing can be measured, and the prediction stands."""
    if device.type != "cuda":
        return None
    if memory.device_is_idle(device):
        return memory.CudaMeter(device, WARMUP_STEPS)
    print(f"s2a: other processes hold memory on {device}: the peak in the result stays the predicted one", file=sys.stderr)
    return None


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    val = f", val top-1 {line['val_top1']:.2f} %" if line["val_top1"] is not None else ""
    return f"epoch {line['epoch']}/{epochs}: loss {line['train_loss']:.3f}{val}"


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=true needs the package: pip install 's2a[tensorboard]'") from None
    return SummaryWriter(str(folder))


def lr_factor(config: DictConfig, per_epoch: int):
    """step -> share of the learning rate: linear warm-up, then constant or a cosine to zero."""
    total, warmup = config.optim.epochs * per_epoch, config.optim.warmup_epochs * per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.optim.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def mixing(config: DictConfig, classes: int):
    """mixup and cutmix on a batch; with both, one of them at random. Without, the batch as it is."""
    optim = config.optim
    kinds = [kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, optim.mixup), (v2.CutMix, optim.cutmix)) if a]
    return v2.RandomChoice(kinds) if kinds else lambda images, targets: (images, targets)


@torch.no_grad()
def accuracy(run: Run, loader: data.Loader) -> dict[str, float | None]:
    """Mean loss, top-1 and top-5 in % over a split; top-5 is None with fewer than six classes."""
    run.model.eval()
    step = Step(run.config, run.device)
    loss = top1 = top5 = count = 0
    five = len(run.splits.classes) > 5
    for images, targets in loader:
        images, targets = images.to(run.device), targets.to(run.device)
        logits = step.logits(run.model, images)
        loss += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        top1 += (logits.argmax(1) == targets).sum().item()
        if five:
            top5 += (logits.topk(5).indices == targets[:, None]).sum().item()
        count += len(images)
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count if five else None}


def predict(run: Run) -> memory.Memory:
    """The predicted memory of this run's step, with full fine-tuning's beside it."""
    run.train_mode()
    exact = OmegaConf.merge(run.config, {"quant": dict.fromkeys(("bits", "pointwise", "norm", "attention", "softmax", "linear"))})
    whole = backbones.build(run.config.backbone, len(run.splits.classes), meta=True)
    METHODS["full"](OmegaConf.create({"name": "full", "blocks": "all"})).attach(whole)
    whole.model.to(weight_dtype(run.config.precision)).train()
    return _predict(run.backbone, run.config).against(_predict(whole, exact))


def _predict(backbone: Backbone, config: DictConfig) -> memory.Memory:
    count, size = config.optim.batch_size, backbone.image.size
    batch = torch.empty(count, 3, size, size), torch.empty(count, dtype=torch.int64)
    step = Step(config, torch.device("cpu"))
    return memory.predict(backbone.model, batch, step, lambda model: make_optimizer(config.optim, model))


def evaluate(config: DictConfig, folder: Path) -> dict[str, float | None]:
    """Tests a finished run again from its saved tensors: top1 and top5 in %.

    Raises UserError when the data, the backbone's weights or the tensors are not those of the run.
    """
    recorded = records.read_result(folder)
    run = prepare(config)
    if run.splits.revision != recorded["data"]["revision"]:
        raise UserError(f"{folder}: trained on data of revision {recorded['data']['revision']}, found {run.splits.revision}")
    checkpoints.load(folder, run.model, run.weights, run.statistics)
    return accuracy(run, run.loader("test"))
