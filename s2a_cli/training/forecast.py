"""Predicts the memory that a run needs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from s2a_cli import backbones, memory, methods
from s2a_cli.activations import REFERENCE
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import type_and_first_line
from s2a_cli.config.settings import replaced
from s2a_cli.memory.allocator import is_expandable
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.feature_head import FeatureHead, Features
from s2a_cli.methods.parts.tail import Tail
from s2a_cli.training import feature_cache
from s2a_cli.training.run import Run, attach
from s2a_cli.training.step import Batch, Step, convert, make_optimizer, stays_in_pixels, train_mode, weight_dtype


class NotPredicted(UserError):
    """A step whose memory can't be predicted."""


def predict(run: Run) -> dict[str, Any] | None:
    """Predicts the memory of this run's step, with full fine-tuning's beside it; None where it can't be predicted."""
    images = len(run.splits.train)
    try:
        mine = profile_step(run.attached, run.config, images, distributed.rank_and_world_size()[1])
        full = predict_step(*full_finetuning(run.config, len(run.splits.classes)), images)
    except Exception as error:  # a model of timm whose forward pass reads values can't run without data
        print(f"s2a: the memory of this run can't be predicted: {type_and_first_line(error)}", file=sys.stderr)
        return None
    taken = mine.reserved_bytes(is_expandable()) / MIB
    return replace(mine.memory, reserved_mib=taken).against(full).as_dict()


def full_finetuning(config: DictConfig, classes: int) -> tuple[Attachment, DictConfig]:
    """Returns the same composition under full fine-tuning with stock PyTorch, for a prediction, and its config."""
    whole = backbones.build(config.backbone, classes, meta=True)
    attached = methods.attach(OmegaConf.create({"name": "full", "blocks": "all"}), whole)
    convert(whole.model, config)
    return attached, replaced(config, {"quant": asdict(REFERENCE)})


def profile_composition(config: DictConfig, classes: int, images: int) -> memory.Profile | None:
    """Predicts the memory of a run's step without its data or weights; None where it can't be predicted."""
    if config.compile or config.budget:  # settings for a budget are chosen on images of the run
        return None
    backbone = backbones.build(config.backbone, classes, meta=True)
    try:
        return profile_or_refuse(attach(config, backbone), config, images, distributed.rank_and_world_size()[1])
    except NotPredicted:
        return None


def predict_step(attached: Attachment, config: DictConfig, images: int) -> memory.Memory:
    """Predicts the memory of one training step of a config, of at most `images` images."""
    return profile_step(attached, config, images, distributed.rank_and_world_size()[1]).memory


def profile_step(
    attached: Attachment, config: DictConfig, images: int, processes: int = 1, dtype: torch.dtype | None = None
) -> memory.Profile:
    """Predicts the memory of a step and where it is, for the first of several processes that share a batch.

    dtype: of a batch on the device; None for what a run has there.
    """
    return replace(_profile(attached, config, images, processes, dtype), graphs=bool(config.cuda_graphs))


def profile_or_refuse(
    attached: Attachment, config: DictConfig, images: int, processes: int = 1, dtype: torch.dtype | None = None
) -> memory.Profile:
    """Does what `profile_step` does. Raises NotPredicted, a UserError, for a step that can't run without data."""
    try:
        return profile_step(attached, config, images, processes, dtype)
    except UserError:
        raise
    except Exception as error:  # models and tuners have many ways to read values
        first = type_and_first_line(error)
        if "allocate memory" in first:
            first += "; this system gives no address space beyond its memory: see vm.overcommit_memory"
        what = f"{config.backbone.timm} with method={config.method.name}"
        raise NotPredicted(f"{what} can't be predicted: {first}") from error


def _profile(
    attached: Attachment, config: DictConfig, most: int, processes: int, dtype: torch.dtype | None
) -> memory.Profile:
    backbone, model = attached.backbone, attached.model
    train_mode(model)
    count, size = -(-min(config.optim.batch_size, most) // processes), backbone.image.size
    in_pixels = stays_in_pixels(config.optim) or config.dataset.cache
    dtype = dtype or (torch.uint8 if in_pixels else weight_dtype(config.precision))
    step = Step(config, torch.device("cpu"), attached)
    images, targets = torch.empty(count, 3, size, size, dtype=dtype), torch.empty(count, dtype=torch.int64)
    if dtype != torch.uint8:
        images = images.to(memory_format=step.layout)  # as a run prepares them
    if config.dataset.cache and attached.feature_head:
        return _profile_cached(attached, attached.feature_head, config, step, images, targets)
    return _profile_step(model, attached, config, step, [images], targets)


def graphed(step: Callable[..., Any], micro_batch: int | None) -> Callable[..., None]:
    """Returns a step as CUDA graphs take it: a copy of a micro-batch and all gradients are there from the start."""

    def run(model: nn.Module, optimizer: Optimizer, images: Batch, targets: Tensor, after_forward: Callable) -> None:
        tensors = [*(images.tensors if isinstance(images, Features) else [images]), targets]
        copied = [tensor[:micro_batch].clone() for tensor in tensors]
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        step(model, optimizer, images, targets, after_forward=after_forward)
        del copied

    return run


def _profile_step(
    module: nn.Module, attached: Attachment, config: DictConfig, step: Step, tensors: list[Tensor], targets: Tensor
) -> memory.Profile:
    """Predicts a step on images, or on the tensors of their kept features, that go through a module.

    One of many micro-batches is predicted by its first two, while the whole batch is there: the second finds gradients
    beside what it keeps, as all others do. For the step that creates the optimiser's state one of them will do.
    """
    whole, micro = [*tensors, targets], config.optim.micro_batch
    taken = graphed(step, micro) if config.cuda_graphs else step
    counts, given = itertools.repeat(len(targets)), whole
    if micro and len(targets) > 2 * micro:
        counts, given = iter((micro, 2 * micro)), [t[: 2 * micro] for t in whole] + [t[2 * micro :] for t in whole]

    def run(model: nn.Module, optimizer: Optimizer, *given: Tensor, after_forward: Callable[[], None]) -> None:
        count = next(counts)
        *batch, targets = (t[:count] for t in given[: len(whole)])
        images = batch[0] if module is attached.model else Features(batch)
        taken(model, optimizer, images, targets, after_forward=after_forward)

    def make(model: nn.Module) -> Optimizer:
        return make_optimizer(config.optim, model, attached)

    return memory.profile(module, given, run, make, attached.backbone.parts if module is attached.model else {})


def _profile_cached(
    attached: Attachment, head: FeatureHead | Tail, config: DictConfig, step: Step, images: Tensor, targets: Tensor
) -> memory.Profile:
    """Predicts the memory of a run that trains on kept features.

    It is that of the forward pass that fills the files, or of the step of the trained part alone, whichever is more.
    """
    few = images[: feature_cache.fill_size(config)]
    key = len(few), few.dtype, config.precision, config.optim.name, config.backbone.weights
    known = _FILLING.setdefault(head, {})
    if key not in known:
        known[key] = _profile_filling(attached, head, config, few)
    filling, fields = known[key]
    kept = [torch.empty(len(targets), *shape, dtype=dtype) for shape, dtype in fields]
    training = _profile_step(head, attached, config, step, kept, targets)
    return max(filling, training, key=lambda profile: profile.memory.peak_mib)


Filling = tuple[memory.Profile, list[tuple[torch.Size, torch.dtype]]]  # and the shape and dtype of what is kept
# Of each feature head: the many plans of a run fill their files alike.
_FILLING: WeakKeyDictionary[nn.Module, dict[tuple, Filling]] = WeakKeyDictionary()


def _profile_filling(attached: Attachment, head: FeatureHead | Tail, config: DictConfig, images: Tensor) -> Filling:
    """Predicts the forward pass that fills the files, of so many images at a time."""
    fields: list[tuple[torch.Size, torch.dtype]] = []
    step = feature_cache.filling_step(config, attached, torch.device("cpu"))

    def fills(model: nn.Module, optimizer: Optimizer, images: Tensor, after_forward: Callable[[], None]) -> None:
        with torch.no_grad():
            features, _ = head.capture(lambda: step.logits(model, images))
        fields[:] = [(t.shape[1:], t.dtype) for t in features.tensors]
        after_forward()

    def make(model: nn.Module) -> Optimizer:
        return make_optimizer(config.optim, model, attached)

    return memory.profile(attached.model, [images], fills, make, attached.backbone.parts), fields
