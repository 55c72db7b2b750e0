"""Plans runs and compositions: what `s2a train budget=`, `s2a plan` and `s2a memory budget=` stand on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from s2a_cli import backbones
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.config.settings import merge, replaced
from s2a_cli.memory.margin import Margin
from s2a_cli.methods import Attachment
from s2a_cli.planner import kept_features, plan
from s2a_cli.planner.fallbacks import said
from s2a_cli.planner.kept_features import Decision
from s2a_cli.planner.run_memory import Composition
from s2a_cli.planner.sizes import size
from s2a_cli.planner.task import Task
from s2a_cli.results import record
from s2a_cli.training import feature_cache
from s2a_cli.training.criterion import Criterion
from s2a_cli.training.run import Run, attach, check_steady, choose_device, no_graphs
from s2a_cli.training.step import Batch

PLENTY = 64  # images, at most, that measurements take
ENOUGH = 8  # where their features have to be computed before


def plan_run(run: Run) -> record.Plan:
    """Returns the plan of a run's steps, measured on its first images. May move its model to its device.

    Raises UserError where nothing fits its budget.
    """
    loader = run.loader("train", train=True)
    loader.epoch = 1
    images, targets = next(iter(loader))
    splits, processes = run.splits, distributed.rank_and_world_size()[1]
    classes, count = len(splits.classes), len(splits.train)

    def decide(config: DictConfig) -> Decision:
        others = len(splits.val) + len(splits.test)
        filled = functools.partial(feature_cache.is_filled, run)
        return kept_features.decide(config, run.attached, images, count, others, run.device, processes, filled)

    def planned(config: DictConfig, chosen: dict[str, Any]) -> record.Plan:
        def stored(weights: str | None) -> Attachment:
            if weights in (None, "fp32"):
                return run.attached
            changed = replaced(config, {"backbone.weights": weights})
            torch.manual_seed(config.seed)  # the same head as the run's, and the same weights where none are loaded
            return attach(changed, backbones.build(config.backbone, classes))

        task = _task(config, run.attached, classes, count, run.device, processes, chosen)
        return _plan(task, (images, targets), run.device, stored, criterion=run.criterion())

    return _decided(run.config, decide, planned)


def plan_composition(composition: Composition, processes: int = 1) -> record.Plan:
    """Returns the plan of a composition without its data or weights: random ones take the same time.

    Nothing is timed but what costs are made of, and what codes do to gradients is not looked at. Raises UserError where
    nothing fits.
    """
    classes, device = composition.classes, choose_device(composition.config.device)
    attached = attach(composition.config, backbones.build(composition.config.backbone, classes, meta=True))
    count, pixels = min(composition.config.optim.batch_size, PLENTY), attached.backbone.image.size
    images, targets = torch.randn(count, 3, pixels, pixels), torch.arange(count) % classes

    @functools.cache
    def stored(weights: str | None) -> Attachment:
        config = composition.config
        weights = weights or config.backbone.weights
        random = merge(config, {"backbone": {"pretrained": False, "checkpoint": None, "weights": weights}})
        return attach(random, backbones.build(random.backbone, classes))

    def decide(config: DictConfig) -> Decision:
        return kept_features.decide(config, stored(None), images, composition.images, 0, device, processes)

    def planned(config: DictConfig, chosen: dict[str, Any]) -> record.Plan:
        task = _task(config, attached, classes, composition.images, device, processes, chosen)
        return _plan(task, (images, targets), device, stored, is_real=False)

    if composition.config.dataset.cache == "features":
        check_steady(stored(None))
    return _decided(composition.config, decide, planned)


def _decided(
    config: DictConfig,
    decide: Callable[[DictConfig], Decision],
    planned: Callable[[DictConfig, dict[str, Any]], record.Plan],
) -> record.Plan:
    """Returns what `planned` makes of a config, with dataset.cache=auto decided first, and of what was decided."""
    if config.dataset.cache != "auto":
        return planned(config, {})
    decision = decide(config)
    try:
        made = planned(decision.applied(config), decision.settings)
    except plan.NothingFits:
        if not decision.keeps:
            raise
        decision = Decision(False, "does not fit the budget")
        made = planned(decision.applied(config), decision.settings)
    made["asked"] |= dict.fromkeys(decision.settings, "auto")
    made["choices"].append(decision.other)
    return made


def _plan(
    task: Task,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    stored: Callable[[str | None], Attachment],
    is_real: bool = True,
    criterion: Criterion | None = None,
) -> record.Plan:
    """Returns the plan of a task, on kept features where its config has them; the arguments are those of plan.make."""
    cached = bool(task.config.dataset.cache)
    images, targets = (tensor[: ENOUGH if cached else None] for tensor in batch)

    def read(attached: Attachment, images: Tensor) -> Batch:
        return kept_features.captured(task.config, attached, images, device) if cached else images

    return plan.make(task, (images, targets), device, stored, lambda least: said(task, least), is_real, criterion, read)


def _task(
    config: DictConfig,
    attached: Attachment,
    classes: int,
    images: int,
    device: torch.device,
    processes: int,
    chosen: dict[str, Any],
) -> Task:
    """Returns what is planned; on CUDA the budget is the memory of a device, with its context.

    Passes are replayed as CUDA graphs where those of all candidates can be, unless the config forbids it. Raises
    UserError where it asks for what can't be.
    """
    margin = Margin() if device.type == "cuda" else None
    any_candidate = replaced(config, {"quant.recompute": "block"})
    needed = no_graphs(any_candidate, attached, device, processes)
    if config.cuda_graphs and needed:
        raise UserError(f"cuda_graphs=true needs {needed}")
    graphs = config.cuda_graphs is not False and not needed
    available, run = size("budget", config.budget), config.optim.epochs * images / processes
    return Task(config, attached, classes, images, available, margin, processes, graphs, run_images=run, chosen=chosen)
