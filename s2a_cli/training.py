"""Train and evaluate one run: config in, a folder with `result.json` out."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from s2a_cli import allocation, backbones, checkpoints, data, frozen, memory, records
from s2a_cli.activations import STOCK
from s2a_cli.backbones import Backbone
from s2a_cli.config import QuantConfig, show
from s2a_cli.errors import RunError, UserError
from s2a_cli.methods import METHODS
from s2a_cli.progress import Progress
from s2a_cli.steps import Step, make_optimizer, moving_norms, train_mode, weight_dtype

WARMUP_STEPS = 3  # left out of throughput and of measured memory
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass
class Run:
    """What a config stands for, made: its data, its backbone with the method attached, and where it runs."""

    config: DictConfig
    splits: data.Splits
    backbone: Backbone
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


def prepare(config: DictConfig) -> Run:
    """Loads the data and the backbone, and attaches the method, on the CPU. Raises UserError for input that does not fit."""
    device = choose_device(config.device)
    splits = data.load(config.dataset)
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, len(splits.classes))
    weights = backbone.fingerprint()
    torch.manual_seed(config.seed)  # the method's initial values do not depend on how the backbone drew its own
    METHODS[config.method.name](config.method).attach(backbone)
    if moving_norms(backbone.model):
        _refuse_parts(config)
    if odd := [number for number in config.quant.blocks if not 0 <= number < len(backbone.blocks)]:
        raise UserError(f"quant.blocks: there is no block {odd[0]}; this backbone has those from 0 to {len(backbone.blocks) - 1}")
    backbone.model.to(weight_dtype(config.precision))
    frozen.store(backbone, config.backbone.weights)
    return Run(config, splits, backbone, weights, device)


def _refuse_parts(config: DictConfig) -> None:
    """Raises UserError for settings under which BatchNorms that train would see other statistics than the batch's."""
    optim, quant = config.optim, config.quant
    for key, value, default in (
        ("optim.micro_batch", optim.micro_batch, None),
        ("quant.chunks", quant.chunks, 1),
        ("quant.recompute", quant.recompute, "none"),
        ("quant.budget_mib", quant.budget_mib, None),
    ):
        if value != default:
            raise UserError(
                f"{key}={value} changes the result here: method={config.method.name} trains BatchNorms, whose statistics"
                f" are those of one forward pass of the batch; set it to {show(default)}"
            )


def choose_device(name: str) -> torch.device:
    """auto takes CUDA where it is. Makes CUDA deterministic. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if OUT_OF_MEMORY.search(str(error)):
            raise RunError(f"device={name}: has no memory left: {_first_line(error)}") from None
        raise UserError(f"device={name}: not available here ({_first_line(error)}); use device=auto or cpu") from None
    return device


def train(config: DictConfig) -> tuple[records.Result, Path]:
    """Trains one run and returns its record and its folder.

    Out of memory and Ctrl-C end in a record with that status, tensors of the best epoch so far saved. Any other failure is
    recorded as `failed` and raised. What an earlier run left in the folder is removed first.
    """
    if config.run_dir:
        records.make_run_dir(Path(config.run_dir))  # before anything is downloaded
    run = prepare(config)
    chosen = _allocate(run) if config.quant.budget_mib else None
    identity = records.identity(config, run.splits.revision, run.weights)
    place = config.run_dir or f"runs/{run.splits.name}/{config.backbone.name}/{config.method.name}/{identity}"
    folder = records.make_run_dir(Path(place))
    for name in ("result.json", "metrics.jsonl", "traceback.txt", checkpoints.FILE):
        (folder / name).unlink(missing_ok=True)
    result = _blank(run, config, identity) | {"allocation": chosen}
    records.write_result(folder, result)
    try:
        records.atomic_write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        with ExitStack() as stack:
            board = _tensorboard(folder, stack) if config.tensorboard else None
            result["memory"] = None if config.compile else predict(run)  # the compiler decides what it keeps
            run.model.to(run.device)
            if config.compile:
                _compile(run.model, config.compile_budget)
            _fit(run, folder, result, board)
        result["status"], result["error"] = "ok", None
    except KeyboardInterrupt:
        result["status"], result["error"] = "interrupted", "interrupted"
    except Exception as error:
        out_of_memory = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
        result["status"], result["error"] = "oom" if out_of_memory else "failed", _first_line(error)
        if not out_of_memory:
            records.atomic_write(folder / "traceback.txt", traceback.format_exc())
            raise
    finally:
        records.write_result(folder, result)
    return result, folder


def _allocate(run: Run) -> dict[str, Any]:
    """Gives the run the quant settings that fit its budget, prints and returns them. Raises UserError where none do."""

    def peak(quant: QuantConfig, micro_batch: int | None = run.config.optim.micro_batch) -> float:
        changed = {"quant": OmegaConf.structured(quant), "optim": {"micro_batch": micro_batch}}
        return predict_step(run.backbone, OmegaConf.merge(run.config, changed), len(run.splits.train)).peak_mib

    loader = run.loader("train", train=True)
    loader.epoch = 0
    images, targets = next(iter(loader))
    run.model.to(run.device)
    few = images[: allocation.IMAGES], targets[: allocation.IMAGES]
    choice = allocation.allocate(allocation.Gradient(run.config, run.backbone, few, run.device), peak)
    print(choice.describe())
    run.config = OmegaConf.merge(run.config, {"quant": OmegaConf.structured(choice.quant)})
    return OmegaConf.to_container(run.config.quant)


def _blank(run: Run, config: DictConfig, identity: str) -> records.Result:
    """A result as it stands if the process is killed."""
    splits = run.splits
    return {
        "schema": records.SCHEMA,
        "id": identity,
        "status": "failed",
        "error": "the run did not end",
        "config": OmegaConf.to_container(config, resolve=True),
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


def _fit(run: Run, folder: Path, result: records.Result, board: Any) -> None:
    """Trains, keeps the tensors of the epoch with the best validation accuracy, tests these once."""
    config, optim = run.config, run.config.optim
    step, optimizer = Step(config, run.device, run.backbone.block_modules), make_optimizer(optim, run.model)
    loader, validation = run.loader("train", train=True), run.loader("val")
    schedule = LambdaLR(optimizer, lr_factor(optim, len(loader)))
    mix = mixing(optim, len(run.splits.classes))
    meter = _meter(run.device)
    rates: list[float] = []
    lines: list[str] = []
    best, best_state = (-1.0, 0.0), {}
    with Progress("training", optim.epochs * len(run.splits.train), " images") as progress:
        for epoch in range(1, optim.epochs + 1):
            train_mode(run.model)
            loader.epoch, begun, losses, seen = epoch, time.perf_counter(), 0.0, 0
            for index, (images, targets) in enumerate(loader):
                torch.manual_seed(data.mix(config.seed, epoch, index))  # dropout and mixing: f(seed, epoch, step)
                started, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
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
                    raise RunError(f"the loss is {loss} in epoch {epoch}, step {index + 1}: lower optim.lr={optim.lr:g}")
                rates.append(count / (time.perf_counter() - started))
                losses, seen = losses + loss * count, seen + count
                progress.add(count, epoch=f"{epoch}/{optim.epochs}", loss=f"{losses / seen:.3f}")
            scores = accuracy(run, validation)
            if (found := (scores["top1"], -scores["loss"])) > best:  # small validation splits tie often
                best, best_state = found, checkpoints.trainable_state(run.model)
                checkpoints.save(folder, best_state, step.calibration, run.weights)
                result["accuracy"].update(val_top1=scores["top1"], best_epoch=epoch)
            line = {
                "epoch": epoch,
                "train_loss": losses / seen,
                "val_loss": scores["loss"],
                "val_top1": scores["top1"],
                "lr": rate,
                "seconds": time.perf_counter() - begun,
            }
            lines.append(json.dumps(line) + "\n")
            records.atomic_write(folder / "metrics.jsonl", "".join(lines))
            progress.note(
                f"epoch {epoch}/{optim.epochs}: loss {line['train_loss']:.3f}, val top-1 {line['val_top1']:.2f} %"
            )
            for key in line.keys() - {"epoch"} if board else ():
                board.add_scalar(key, line[key], epoch)
    if rates[WARMUP_STEPS:]:
        result["throughput"]["train_images_per_second"] = statistics.median(rates[WARMUP_STEPS:])
    if meter and meter.memory:
        full = {k: v for k, v in (result["memory"] or {}).items() if k.startswith("full_")}
        result["memory"] = meter.memory.as_dict() | full
    checkpoints.restore(run.model, best_state)
    scores = accuracy(run, run.loader("test"))
    result["accuracy"].update(test_top1=scores["top1"], test_top5=scores["top5"])


def _compile(model: nn.Module, budget: float | None) -> None:
    """Compiles the model in place. budget: the share of activations that the compiler may keep, null: as many as it likes."""
    torch._functorch.config.activation_memory_budget = 1.0 if budget is None else budget
    model.compile()


def _meter(device: torch.device) -> memory.CudaMeter | None:
    """What measures the memory of steps; None where nothing can be measured, and the prediction stands."""
    if device.type != "cuda":
        return None
    if memory.device_is_idle(device):
        return memory.CudaMeter(device, WARMUP_STEPS)
    print(f"s2a: other processes hold memory on {device}: the peak in the result stays the predicted one", file=sys.stderr)
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _tensorboard(folder: Path, stack: ExitStack) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=true needs a package that is not here: pip install tensorboard") from None
    return stack.enter_context(SummaryWriter(str(folder)))


def lr_factor(optim: DictConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> share of the learning rate: linear warm-up, then constant or a cosine to zero."""
    total, warmup = optim.epochs * steps_per_epoch, optim.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if optim.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def mixing(optim: DictConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """mixup and cutmix on a batch; with both, one of them at random. Without, the batch as it is."""
    kinds = [kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, optim.mixup), (v2.CutMix, optim.cutmix)) if a]
    return v2.RandomChoice(kinds) if kinds else lambda images, targets: (images, targets)


@torch.no_grad()
def accuracy(run: Run, loader: data.Loader) -> dict[str, float | None]:
    """Mean loss, top-1 and top-5 in % over a split; top-5 is None with fewer than six classes."""
    run.model.eval()
    step = Step(run.config, run.device, run.backbone.block_modules)
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


def predict(run: Run) -> dict[str, Any] | None:
    """The predicted memory of this run's step, with full fine-tuning's beside it; None where it can't be predicted."""
    exact = OmegaConf.merge(run.config, {"quant": OmegaConf.structured(STOCK)})
    whole = backbones.build(run.config.backbone, len(run.splits.classes), meta=True)
    METHODS["full"](OmegaConf.create({"name": "full", "blocks": "all"})).attach(whole)
    whole.model.to(weight_dtype(run.config.precision))
    try:
        mine, full = (predict_step(b, c, len(run.splits.train)) for b, c in ((run.backbone, run.config), (whole, exact)))
    except Exception as error:  # a model of timm whose forward pass reads values can't run without data
        print(f"s2a: the memory of this run can't be predicted: {_first_line(error)}", file=sys.stderr)
        return None
    return mine.against(full).as_dict()


def predict_step(backbone: Backbone, config: DictConfig, images: int) -> memory.Memory:
    """The predicted memory of one training step of a config, of at most `images` images."""
    train_mode(backbone.model)
    count, size = min(config.optim.batch_size, images), backbone.image.size
    batch = torch.empty(count, 3, size, size), torch.empty(count, dtype=torch.int64)
    step = Step(config, torch.device("cpu"), backbone.block_modules)
    return memory.predict(backbone.model, batch, step, lambda model: make_optimizer(config.optim, model))


def evaluate(config: DictConfig, folder: Path) -> dict[str, float | None]:
    """Tests a finished run again from its saved tensors: top1 and top5 in %.

    Raises UserError when the data, its splits, the backbone's weights or the tensors are not those of the run.
    """
    recorded = records.read_result(folder)
    for key, value in OmegaConf.to_container(config.dataset).items():
        if f"dataset.{key}" not in records.NOT_IDENTITY and value != recorded["config"]["dataset"].get(key):
            raise UserError(
                f"dataset.{key}={value}: the run was made with {recorded['config']['dataset'].get(key)};"
                " another split could hold images that it was trained on"
            )
    run = prepare(config)
    if run.splits.revision != recorded["data"]["revision"]:
        raise UserError(f"{folder}: trained on data of revision {recorded['data']['revision']}, found {run.splits.revision}")
    run.model.to(run.device)
    checkpoints.load(folder, run.model, run.weights)
    return accuracy(run, run.loader("test"))
