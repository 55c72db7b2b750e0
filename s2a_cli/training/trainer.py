"""Train and evaluate one run: config in, a folder with `result.json` out."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from s2a_cli import backbones, data, memory
from s2a_cli.activations import STOCK
from s2a_cli.backbones import Backbone, weight_quant
from s2a_cli.common import distributed
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.config.schema import QuantConfig, show
from s2a_cli.methods import METHODS, Method
from s2a_cli.results import record, run_folder
from s2a_cli.training import bit_allocation, checkpoints, feature_cache
from s2a_cli.training.compiling import compile_model
from s2a_cli.training.loop import Fit, accuracy
from s2a_cli.training.step import Step, make_optimizer, moving_norms, train_mode, weight_dtype

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk; what failed can go on when there is space
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass
class Run:
    """What a config stands for, made: its data, its backbone with the method attached, and where it runs."""

    config: DictConfig
    splits: data.Splits
    backbone: Backbone
    weights: str  # fingerprint of the pretrained tensors
    device: torch.device
    content: str  # see records.content
    feature_cache: feature_cache.Cache | None = None  # with dataset.cache=taps, once it is open

    @property
    def identity(self) -> str:
        return record.identity(self.content)

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def trained(self) -> nn.Module:
        """What the batches of `loader` go through: the model, or with kept taps the part of it that is trained."""
        return self.backbone.tail if self.cache else self.model

    def loader(self, split: str, train: bool = False) -> data.Loader:
        if self.cache:
            return self.cache.loader(self, split, train, distributed.part())
        config, dataset = self.config, getattr(self.splits, split)
        return data.loader(
            dataset,
            data.build_transform(self.backbone.image, config.dataset, train),
            config.optim.batch_size,
            seed=config.seed,
            train=train,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            part=distributed.part(),
        )


def prepare(config: DictConfig) -> Run:
    """Loads the data and the backbone, and attaches the method, on the CPU.

    Raises UserError for input that does not fit.
    """
    device = choose_device(config.device)
    splits = data.load(config.dataset)
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, len(splits.classes))
    weights = backbone.fingerprint()
    attach(config, backbone)
    processes = distributed.part()[1]
    if config.dataset.cache:
        feature_cache.check_steady(backbone)
        if processes > 1:
            raise UserError(
                "dataset.cache=taps trains in one process: what is left to train is small; start without torchrun"
            )
    if (least := min(config.optim.batch_size, len(splits.train))) < processes:
        raise UserError(
            f"a batch of {least} images can't be shared by {processes} processes; start fewer, or raise"
            " optim.batch_size"
        )
    content = record.content(OmegaConf.to_container(config, resolve=True), splits.revision, weights)
    return Run(config, splits, backbone, weights, device, content)


def attach(config: DictConfig, backbone: Backbone) -> None:
    """Makes a backbone, which may be on the meta device, what a config trains.

    Raises UserError for what does not fit it.
    """
    torch.manual_seed(config.seed)  # the method's initial values do not depend on how the backbone drew its own
    method = METHODS[config.method.name](config.method)
    method.attach(backbone)
    if config.optim.head_lr:
        for layer in backbone.head.layers.values():
            layer.lr_scale = config.optim.head_lr / config.optim.lr
    if config.dataset.cache:
        backbone.tail = method.tail(backbone)
        if not backbone.tail:
            accepted = " and ".join(name for name, kind in METHODS.items() if kind.tail is not Method.tail)
            raise UserError(
                f"dataset.cache={config.dataset.cache}: method={config.method.name} changes what the backbone computes,"
                f" so that it has to run in every step; accepted are {accepted}"
            )
    if moving_norms(backbone.model):
        _refuse_parts(config)
        if config.optim.batch_size == 1 and backbones.lacks_variance(backbone, train_mode):
            raise UserError(
                f"optim.batch_size=1: method={config.method.name} trains BatchNorms, and one of {config.backbone.name}"
                " then has one value a channel and no variance; set it to 2 or more"
            )
    if config.quant.recompute == "block":
        backbone.check_recomputable()
    if odd := [number for number in config.quant.blocks if not 0 <= number < len(backbone.block_modules)]:
        raise UserError(
            f"quant.blocks: there is no block {odd[0]}; this backbone has those from 0 to"
            f" {len(backbone.block_modules) - 1}"
        )
    backbone.model.to(weight_dtype(config.precision))
    weight_quant.store(backbone, config.backbone.weights)


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
                f"{key}={show(value)} changes the result here: method={config.method.name} trains BatchNorms, whose"
                f" statistics are those of one forward pass of the batch; set it to {show(default)}"
            )
    if distributed.part()[1] > 1:
        raise UserError(
            f"method={config.method.name} trains BatchNorms, whose statistics are those of a whole batch: use one"
            " process"
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


def train(config: DictConfig, anew: bool = False, once: bool = False) -> tuple[record.Result, Path]:
    """Trains one run and returns its record and its folder.

    A run that is finished is left as it is, and one that was broken off goes on, unless it is to start `anew`. That,
    and another run in the same folder, leaves a finished one in place until the new one is whole (see folders). Out of
    memory and Ctrl-C end in a record with that status, as does a full disk, with `interrupted`. Any other failure is
    recorded as `failed` and raised. Raises UserError when another process is at the same run, when the folder holds a
    run of another config or somebody's files, and, sooner without `once`, when others use the run's CUDA device, unless
    `busy` allows that.
    """
    own = distributed.own_device(
        config.device
    )  # asked about before this process, or one it is joined to, holds any of it
    refused = memory.refusal(own) if config.busy == "refuse" and own else None
    if refused and not once:
        raise refused
    with ExitStack() as stack:
        config.device = stack.enter_context(distributed.joined(config.device))
        if config.run_dir:
            run_folder.usable(Path(config.run_dir))  # before anything is downloaded
        run = prepare(config)
        folder = Path(
            config.run_dir or f"runs/{run.splits.name}/{config.backbone.name}/{config.method.name}/{run.identity}"
        )
        place = distributed.from_first(lambda: run_folder.claim(folder, run.content, anew, stack))
        if place is None:
            print(f"finished before, nothing is trained; --force trains it anew: {folder}")
            return record.read_result(folder), folder
        if refused:
            raise refused
        state = _begin(run, place, anew)
        if place != folder:
            print(f"{folder}: its files stay until this run is whole")
        result = _train(run, place, state)
        if distributed.is_first():
            run_folder.settle(folder)
        return result, folder


def _begin(run: Run, place: Path, anew: bool) -> dict[str, Any] | None:
    """The state from which to go on; None after the place was cleared for a run from the start."""
    state = None if anew else checkpoints.load_state(place)
    if state and state["content"] == run.content:
        return state
    distributed.wait()  # all have looked
    if distributed.is_first():
        place.mkdir(exist_ok=True)
        for name in (run_folder.STATE, run_folder.RECORD, run_folder.METRICS, run_folder.TRACEBACK, run_folder.TENSORS):
            (place / name).unlink(missing_ok=True)
    return None


def _train(run: Run, folder: Path, state: dict[str, Any] | None) -> record.Result:
    config = run.config
    result = _blank(run)
    if config.quant.budget_mib:
        result["allocation"] = state["allocation"] if state else distributed.from_first(lambda: _allocate(run))
        run.config = OmegaConf.merge(config, {"quant": result["allocation"]})
    write = record.write_result if distributed.is_first() else lambda folder, result: None
    write(folder, result)
    try:
        with ExitStack() as stack:
            if distributed.is_first():
                record.atomic_write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
            board = _tensorboard(folder, stack) if config.tensorboard and distributed.is_first() else None
            if distributed.is_first():
                print(data.describe(run.splits))
            result["memory"] = None if config.compile else predict(run)  # the compiler decides what it keeps
            _foretell(result["memory"], run.device)
            run.model.to(run.device)
            stack.enter_context(memory.snapshot(folder, run.device, config.profile == "memory"))
            if config.compile:
                compile_model(run.model, config.compile_budget, run.backbone.image.size)
            if run.backbone.tail:
                run.cache = feature_cache.opened(run)
            if state:
                print(f"going on in {folder}: epoch {state['sofar']['epoch']}, step {state['sofar']['step'] + 1}")
            Fit(run, folder, result, board)(state)
            _judge(run, result["accuracy"]["test_top1"])
        result["status"], result["error"] = "ok", None
    except KeyboardInterrupt:  # torchrun ends all processes when one has ended
        elsewhere = distributed.announced()
        result["status"], result["error"] = ("oom", elsewhere) if elsewhere else ("interrupted", "interrupted")
    except OSError as error:
        if error.errno not in FULL:
            _failed(folder, result, error)
            raise
        result["error"] = f"{error.strerror} below {folder}: make room and start the same line again"
    except Exception as error:
        _failed(folder, result, error)
        if result["status"] == "failed":
            raise
    finally:
        write(folder, result)
    if result["status"] == "ok" and distributed.is_first():
        (folder / checkpoints.STATE).unlink(missing_ok=True)
    return result


def _foretell(predicted: dict[str, Any] | None, device: torch.device) -> None:
    """Says before the first step what the run is predicted to need, and warns where the device has less."""
    if predicted and distributed.is_first():
        said, warning = memory.outlook(predicted, device)
        print(said)
        if warning:
            print(f"s2a: {warning}", file=sys.stderr)


def _judge(run: Run, top1: float | None) -> None:
    """Warns where a test accuracy in % is one that no training is needed for."""
    if (said := data.majority(run.splits, top1)) and distributed.is_first():
        print(f"s2a: {said}", file=sys.stderr)


def _failed(folder: Path, result: record.Result, error: Exception) -> None:
    """Notes in the result how a run failed, in this process or first in another; with a traceback, unless memory ran
    out.
    """
    out_of_memory = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    said = _first_line(error)
    if out_of_memory:
        distributed.announce(said)
    elif elsewhere := distributed.announced():
        out_of_memory, said = True, elsewhere
    result["status"], result["error"] = "oom" if out_of_memory else "failed", said
    if not out_of_memory and distributed.is_first():
        record.atomic_write(folder / "traceback.txt", traceback.format_exc())


def _allocate(run: Run) -> dict[str, Any]:
    """The quant settings that fit the run's budget, printed as well. Raises UserError where none do."""

    def peak(quant: QuantConfig, micro_batch: int | None = run.config.optim.micro_batch) -> float:
        changed = {"quant": OmegaConf.structured(quant), "optim": {"micro_batch": micro_batch}}
        return predict_step(run.backbone, OmegaConf.merge(run.config, changed), len(run.splits.train)).peak_mib

    loader = run.loader("train", train=True)
    loader.epoch = 0
    images, targets = next(iter(loader))
    run.model.to(run.device)
    few = images[: bit_allocation.IMAGES], targets[: bit_allocation.IMAGES]
    choice = bit_allocation.allocate(bit_allocation.Gradient(run.config, run.backbone, few, run.device), peak)
    print(choice.describe())
    return OmegaConf.to_container(OmegaConf.structured(choice.quant))


def _blank(run: Run) -> record.Result:
    """A result as it stands if the process is killed."""
    splits = run.splits
    return {
        "schema": record.SCHEMA,
        "id": run.identity,
        "status": "interrupted",
        "error": "the run did not end",
        "config": OmegaConf.to_container(run.config, resolve=True),
        "allocation": None,
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
        "environment": record.environment(str(run.device)) | {"processes": distributed.part()[1]},
    }


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _tensorboard(folder: Path, stack: ExitStack) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=true needs a package that is not here: pip install tensorboard") from None
    return stack.enter_context(SummaryWriter(str(folder)))


def predict(run: Run) -> dict[str, Any] | None:
    """The predicted memory of this run's step, with full fine-tuning's beside it; None where it can't be predicted."""
    images = len(run.splits.train)
    try:
        mine = predict_step(run.backbone, run.config, images)
        full = predict_step(*full_finetuning(run.config, len(run.splits.classes)), images)
    except Exception as error:  # a model of timm whose forward pass reads values can't run without data
        print(f"s2a: the memory of this run can't be predicted: {_first_line(error)}", file=sys.stderr)
        return None
    return mine.against(full).as_dict()


def full_finetuning(config: DictConfig, classes: int) -> tuple[Backbone, DictConfig]:
    """The same composition under full fine-tuning with stock PyTorch, for a prediction: its backbone, and its
    config.
    """
    whole = backbones.build(config.backbone, classes, meta=True)
    METHODS["full"](OmegaConf.create({"name": "full", "blocks": "all"})).attach(whole)
    whole.model.to(weight_dtype(config.precision))
    return whole, OmegaConf.merge(config, {"quant": OmegaConf.structured(STOCK)})


def predicted_peak(config: DictConfig, classes: int, images: int) -> float | None:
    """The predicted peak in MiB of a run's step, without its data or weights; None where it can't be predicted."""
    if config.compile or config.quant.budget_mib:
        return None
    backbone = backbones.build(config.backbone, classes, meta=True)
    try:
        attach(config, backbone)
        return predict_step(backbone, config, images).peak_mib
    except UserError:
        raise
    except Exception:  # a model of timm whose forward pass reads values can't run without data
        return None


def predict_step(backbone: Backbone, config: DictConfig, images: int) -> memory.Memory:
    """The predicted memory of one training step of a config, of at most `images` images."""
    return profile_step(backbone, config, images, distributed.part()[1]).memory


def profile_step(backbone: Backbone, config: DictConfig, images: int, processes: int = 1) -> memory.Profile:
    """The same with where it is, for the first of several processes that share a batch."""
    train_mode(backbone.model)
    count, size = -(-min(config.optim.batch_size, images) // processes), backbone.image.size
    batch = (
        torch.empty(count, 3, size, size, dtype=weight_dtype(config.precision)),
        torch.empty(count, dtype=torch.int64),
    )
    step = Step(config, torch.device("cpu"), backbone.block_modules)
    if backbone.tail:
        return feature_cache.profile(backbone, config, step, batch, backbone.parts)
    return memory.profile(
        backbone.model, batch, step, lambda model: make_optimizer(config.optim, model), backbone.parts
    )


def evaluate(config: DictConfig, folder: Path) -> dict[str, float | None]:
    """Tests a finished run again from its saved tensors: top1 and top5 in %.

    Raises UserError when the data, its splits, the backbone's weights or the tensors are not those of the run.
    """
    recorded = record.read_result(folder)
    for key, value in OmegaConf.to_container(config.dataset).items():
        if (
            key != "cache"
            and f"dataset.{key}" not in record.NOT_IDENTITY
            and value != recorded["config"]["dataset"].get(key)
        ):
            raise UserError(
                f"dataset.{key}={value}: the run was made with {recorded['config']['dataset'].get(key)};"
                " another split could hold images that it was trained on"
            )
    run = prepare(config)
    if run.splits.revision != recorded["data"]["revision"]:
        raise UserError(
            f"{folder}: trained on data of revision {recorded['data']['revision']}, found {run.splits.revision}"
        )
    run.model.to(run.device)
    checkpoints.load(folder, run.model, run.weights)
    scores = accuracy(run, run.loader("test"))
    _judge(run, scores["top1"])
    return scores
