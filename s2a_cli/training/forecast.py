"""The memory that a run is predicted to need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from s2a_cli import backbones, memory
from s2a_cli.activations import STOCK
from s2a_cli.backbones import Backbone
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.methods import METHODS
from s2a_cli.methods.parts.feature_head import Taps
from s2a_cli.training import feature_cache
from s2a_cli.training.run import Run, _first_line, attach
from s2a_cli.training.step import Step, make_optimizer, train_mode, weight_dtype


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
        return _profile_cached(backbone, config, step, batch, backbone.parts)
    return memory.profile(
        backbone.model, batch, step, lambda model: make_optimizer(config.optim, model), backbone.parts
    )


def _profile_cached(
    backbone: Backbone, config: DictConfig, step: Step, batch: tuple[Tensor, Tensor], blocks: dict[str, nn.Module]
) -> memory.Profile:
    """The predicted memory of a run: the forward pass that fills the files, or the step of the trained part alone,
    whichever takes more.
    """
    tail, (images, targets), fields = backbone.tail, batch, []

    def make(model: nn.Module) -> Optimizer:
        return make_optimizer(config.optim, model)

    def fills(model: nn.Module, optimizer: Optimizer, images: Tensor, after_forward: Callable[[], None]) -> None:
        with torch.no_grad():
            taps, _ = tail.capture(lambda: step.logits(model, images))
        fields[:] = [(t.shape[1:], t.dtype) for t in taps.tensors]
        after_forward()

    def trains(model: nn.Module, optimizer: Optimizer, *tensors: Tensor, after_forward: Callable[[], None]) -> None:
        step(model, optimizer, Taps(tensors[:-1]), tensors[-1], after_forward)

    filling = memory.profile(backbone.model, [images[: feature_cache.fill_size(config)]], fills, make, blocks)
    taps = [torch.empty(len(targets), *shape, dtype=dtype) for shape, dtype in fields]
    training = memory.profile(tail, [*taps, targets], trains, make, {})
    return max(filling, training, key=lambda profile: profile.memory.peak_mib)
