"""Makes a config real: its data, its backbone with what is trained attached to it, and its device."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from s2a_cli import backbones, data, methods
from s2a_cli.backbones import Backbone, frozen_weights
from s2a_cli.common import distributed
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.common.text import listed, type_and_first_line
from s2a_cli.config.rules import show
from s2a_cli.config.settings import plain
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.feature_head import FeatureHead
from s2a_cli.methods.parts.tail import Tail
from s2a_cli.results import record
from s2a_cli.training.compiling import watched
from s2a_cli.training.criterion import Criterion, criterion_of
from s2a_cli.training.step import AUTOCAST, convert, moving_norms, train_mode

if TYPE_CHECKING:
    from s2a_cli.training.feature_cache import Cache

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass
class Run:
    """Holds what a config stands for: its data, its backbone with the method attached, and where it runs."""

    config: DictConfig
    splits: data.Splits
    attached: Attachment
    weights: str  # fingerprint of the pretrained tensors
    device: torch.device
    content: str  # see record.content
    cache: Cache | None = None  # with dataset.cache=features, once it is open

    @property
    def run_id(self) -> str:
        return record.run_id(self.content)

    @property
    def backbone(self) -> Backbone:
        return self.attached.backbone

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def feature_head(self) -> FeatureHead | Tail | None:
        """What is trained, alone, where the config has it read kept features; else None."""
        return self.attached.feature_head if self.config.dataset.cache else None

    @property
    def trained(self) -> nn.Module:
        """What the batches of `loader` go through: the model, or with kept features the part of it that is trained."""
        return self.attached.trained(bool(self.cache))

    @property
    def sampling(self) -> np.ndarray | None:
        """What the chance that a training image is drawn is in proportion to; None where each is seen once an epoch."""
        if self.config.optim.balance != "sampler":
            return None
        return data.image_weights(self.splits.train, len(self.splits.classes))

    def criterion(self) -> Criterion:
        """Returns the training loss."""
        return criterion_of(self.config.optim, self.splits, self.device)

    def loader(self, split: str, train: bool = False) -> data.Loader:
        if self.cache:
            return self.cache.loader(self, split, train, distributed.rank_and_world_size())
        config, dataset = self.config, getattr(self.splits, split)
        return data.loader(
            dataset,
            data.build_transform(self.backbone.image, config.dataset, train, normalise=False),
            config.optim.batch_size,
            seed=config.seed,
            train=train,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            part=distributed.rank_and_world_size(),
            weights=self.sampling if train else None,
        )


def prepare(config: DictConfig) -> Run:
    """Loads the data and the backbone, and attaches the method, on the CPU.

    Raises UserError for input that does not fit.
    """
    device = choose_device(config.device)
    splits = data.load(config.dataset)
    attached, weights = build(config, len(splits.classes))
    processes = distributed.rank_and_world_size()[1]
    if config.dataset.cache == "features":
        check_steady(attached)
        if processes > 1:
            raise UserError(
                "dataset.cache=features trains in one process: what is left to train is small; start without torchrun"
            )
    if (least := min(config.optim.batch_size, len(splits.train))) < processes:
        raise UserError(
            f"a batch of {least} images can't be shared by {processes} processes; start fewer, or raise"
            " optim.batch_size"
        )
    if config.cuda_graphs and not config.budget and (needed := no_graphs(config, attached, device, processes)):
        raise UserError(f"cuda_graphs=true needs {needed}")
    content = record.content(plain(config, resolve=True), splits.revision, weights)
    return Run(config, splits, attached, weights, device, content)


def build(config: DictConfig, classes: int) -> tuple[Attachment, str]:
    """Makes the backbone of a config with its method attached, on the CPU; returns it and its weights' fingerprint.

    Seeds torch's generators. Raises UserError for what does not fit.
    """
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, classes)
    weights = backbone.fingerprint()
    return attach(config, backbone), weights


def attach(config: DictConfig, backbone: Backbone) -> Attachment:
    """Makes a backbone, which may be on the meta device, what a config trains.

    Raises UserError for what does not fit it.
    """
    torch.manual_seed(config.seed)  # the method's initial values do not depend on how the backbone drew its own
    attached = methods.attach(config.method, backbone)
    if config.optim.head_lr:
        factor = config.optim.head_lr / config.optim.lr
        attached = attached.with_learning_rates(backbone.head.layers.values(), factor)
    moving = moving_norms(backbone.model)
    if config.dataset.cache and not attached.feature_head and not moving:
        attached = attached.with_tail()
    if config.dataset.cache == "features" and not attached.feature_head:
        accepted = listed([name for name, kind in methods.STRUCTURES.items() if kind.keeps_features])
        raise UserError(
            f"dataset.cache={config.dataset.cache}: {keeps_nothing(config, attached)}, so that it has to run in every"
            f" step; accepted are {accepted}, and others that leave the first blocks as they are, as"
            " method.blocks=last:4 does"
        )
    if moving:
        blocks = {module for block in backbone.block_modules for module in block.modules()}
        _refuse_parts(config, within_blocks=not blocks or not blocks.isdisjoint(moving))
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
    convert(backbone.model, config)
    frozen_weights.store(backbone, config.backbone.weights, AUTOCAST.get(config.precision))
    return attached


def keeps_nothing(config: DictConfig, attached: Attachment) -> str:
    """Says why no features of the backbone can be kept for what trains in it."""
    moving = moving_norms(attached.model)
    why = "trains BatchNorms" if moving else "changes or reads the backbone from its first block on"
    return f"method={config.method.name} {why}"


def no_graphs(config: DictConfig, attached: Attachment, device: torch.device, processes: int = 1) -> str | None:
    """Returns what the steps of a config would need to be captured as CUDA graphs; None where they can be."""
    blocks = config.quant.blocks.values()
    recomputes = config.quant.recompute == "block" or any(block.get("recompute") == "block" for block in blocks)
    if device.type != "cuda":
        return f"a CUDA device, not {device}"
    if processes > 1:
        return "one process: several add up their gradients within a backward pass"
    if config.backbone.weights == "offload":
        return "weights on the device: backbone.weights=offload brings them on a stream of its own"
    if config.quant.rounding == "stochastic":
        return "quant.rounding=nearest: the seeds of stochastic rounding are numbers of the host"
    if attached.after_step:
        return f"steps that are alike: method={config.method.name} changes what it computes between them"
    try:
        seen = watched(attached.model, attached.backbone.image.size)
    except Exception as error:  # PyTorch has kinds of its own for what can't run without data
        return f"a forward pass that reads no values ({type_and_first_line(error)})"
    if seen.waits:
        return f"operators that the host does not wait for; this model has {seen.waits[0]}"
    if recomputes and seen.random:
        return (
            "blocks without random numbers where they are computed again, and in training this model draws some"
            f" ({seen.random[0]}): set the rates of dropout and stochastic depth to 0"
        )
    return None


def _refuse_parts(config: DictConfig, within_blocks: bool) -> None:
    """Raises UserError for settings under which BatchNorms that train would see other statistics than the batch's.

    within_blocks: whether blocks have such BatchNorms; otherwise blocks may run in parts.
    """
    optim, quant = config.optim, config.quant
    of_blocks = (
        ("quant.chunks", quant.chunks, 1),
        ("quant.recompute", quant.recompute, "none"),
    )
    for key, value, default in (("optim.micro_batch", optim.micro_batch, None), *(of_blocks if within_blocks else ())):
        if value != default:
            raise UserError(
                f"{key}={show(value)} changes the result here: method={config.method.name} trains BatchNorms, whose"
                f" statistics are those of one forward pass of the batch; set it to {show(default)}"
            )
    if distributed.rank_and_world_size()[1] > 1:
        raise UserError(
            f"method={config.method.name} trains BatchNorms, whose statistics are those of a whole batch: use one"
            " process"
        )


def choose_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` takes CUDA where it is.

    Makes CUDA deterministic but for what PyTorch only warns of, such as the backward pass of its fused attention.

    Raises UserError for a device that is not there, RunError for one whose memory is full.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a property that no stub has)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if OUT_OF_MEMORY.search(str(error)):
            raise RunError(f"device={name}: has no memory left: {type_and_first_line(error)}") from None
        raise UserError(
            f"device={name}: not available here ({type_and_first_line(error)}); use device=auto or cpu"
        ) from None
    return device


def check_steady(attached: Attachment) -> None:
    """Raises UserError for a backbone whose frozen part computes something else, or something random, in training."""
    head, model, size = attached.feature_head, attached.model, attached.backbone.image.size
    assert head is not None
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = torch.randn(2, 3, size, size, dtype=weight.dtype, device=weight.device)
        train_mode(model)
        before = torch.get_rng_state()
        try:
            trained, _ = head.capture(lambda: model(images))
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            head(trained)
            steady = torch.equal(after, torch.get_rng_state())
            tested, logits = head.capture(lambda: model.eval()(images))
            steady = steady and all(map(torch.equal, trained.tensors, tested.tensors))
            whole = torch.allclose(head(tested), logits, rtol=1e-3, atol=1e-4)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):  # shapes that do not go together
            steady, whole = True, False
    if not whole:
        raise UserError(f"dataset.cache=features: {head.misfit.format(type(model).__name__)}")
    if not steady:
        raise UserError(
            f"dataset.cache=features: {type(model).__name__} is another in training than in evaluation, with dropout or"
            " dropped paths; switch them off, such as with backbone.kwargs.drop_path_rate=0"
        )
