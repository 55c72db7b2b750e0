"""Plans runs and compositions: what `s2a train budget=`, `s2a plan` and `s2a memory budget=` stand on."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from s2a_cli import backbones
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.config.settings import merge, replaced
from s2a_cli.memory.margin import Margin
from s2a_cli.methods import Attachment
from s2a_cli.planner import plan
from s2a_cli.planner.fallbacks import said
from s2a_cli.planner.run_memory import Composition
from s2a_cli.planner.sizes import size
from s2a_cli.planner.task import Task
from s2a_cli.results import record
from s2a_cli.training.run import Run, attach, choose_device, no_graphs

PLENTY = 64  # images, at most, that measurements take


def plan_run(run: Run) -> record.Plan:
    """Returns the plan of a run's steps, measured on its first images. May move its model to its device.

    Raises UserError where nothing fits its budget.
    """
    loader = run.loader("train", train=True)
    loader.epoch = 1
    images, targets = next(iter(loader))
    processes = distributed.rank_and_world_size()[1]
    classes = len(run.splits.classes)
    task = _task(run.config, run.attached, classes, len(run.splits.train), run.device, processes)

    def stored(weights: str | None) -> Attachment:
        if weights in (None, "fp32"):
            return run.attached
        config = replaced(run.config, {"backbone.weights": weights})
        torch.manual_seed(config.seed)  # the same head as the run's, and the same weights where none are loaded
        return attach(config, backbones.build(config.backbone, classes))

    return plan.make(
        task, (images, targets), run.device, stored, lambda least: said(task, least), True, run.criterion()
    )


def plan_composition(composition: Composition, processes: int = 1) -> record.Plan:
    """Returns the plan of a composition without its data or weights: random ones take the same time.

    Nothing is timed but what costs are made of, and what codes do to gradients is not looked at. Raises UserError where
    nothing fits.
    """
    config, classes = composition.config, composition.classes
    device = choose_device(config.device)

    def stored(weights: str | None) -> Attachment:
        weights = weights or config.backbone.weights
        random = merge(config, {"backbone": {"pretrained": False, "checkpoint": None, "weights": weights}})
        return attach(random, backbones.build(random.backbone, classes))

    attached = attach(config, backbones.build(config.backbone, classes, meta=True))
    task = _task(config, attached, classes, composition.images, device, processes)
    count, pixels = min(task.batch, PLENTY), attached.backbone.image.size
    batch = torch.randn(count, 3, pixels, pixels), torch.arange(count) % classes
    return plan.make(task, batch, device, stored, lambda least: said(task, least), is_real=False)


def _task(
    config: DictConfig, attached: Attachment, classes: int, images: int, device: torch.device, processes: int
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
    return Task(config, attached, classes, images, available, margin, processes, graphs, run_images=run)
