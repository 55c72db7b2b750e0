"""Decides whether a run trains on kept features of its frozen first blocks: `dataset.cache=auto`."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from s2a_cli import data
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import duration
from s2a_cli.config.settings import replaced
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.feature_head import Features
from s2a_cli.results import record
from s2a_cli.training.feature_cache import filling_step
from s2a_cli.training.run import OUT_OF_MEMORY, check_steady, keeps_nothing

IMAGES = 2  # that forward passes are timed with
PASSES = 3  # of each, of which the fastest counts
READ = 1e9  # assumed: bytes of kept features that a second reads
ROOM = 0.1  # of what a disk has free: more is not taken without being asked for


@dataclass(frozen=True)
class Decision:
    """Whether features are kept, and why, or why not."""

    keeps: bool
    why: str

    @property
    def settings(self) -> dict[str, Any]:
        """{dotted key: value} of what was decided."""
        return {"dataset.cache": "features" if self.keeps else None}

    @property
    def other(self) -> record.Choice:
        """What was decided against, as a choice of a plan."""
        return {
            "about": "frozen blocks in every step" if self.keeps else "features kept on disk",
            "words": [],
            "needed_mib": None,
            "predicted_seconds": None,
            "measured_seconds": None,
            "fidelity": None,
            "why": f"keeping features {self.why}",
        }

    def applied(self, config: DictConfig) -> DictConfig:
        """Returns a config with what was decided."""
        return replaced(config, self.settings)


def decide(
    config: DictConfig,
    attached: Attachment,
    images: Tensor,
    count: int,
    others: int,
    device: torch.device,
    processes: int = 1,
    filled: Callable[[Features], bool] = lambda features: False,
) -> Decision:
    """Decides by the seconds that kept features save in all epochs and those that it takes to compute and read them.

    attached: with real weights; its model is moved to the device. images: [B, 3, H, W]. count: images that are trained
    on in an epoch, each of which is kept beside its mirror image. others: images to validate and test on. filled:
    whether all features like these are there from an earlier run.
    """
    head = attached.feature_head
    if head is None:
        return Decision(False, f"is not possible: {keeps_nothing(config, attached)}")
    if processes > 1:
        return Decision(False, "is for one process")
    try:
        check_steady(attached)
    except UserError as error:
        return Decision(False, f"is not possible: {str(error).removeprefix('dataset.cache=features: ')}")
    few = images[:IMAGES]
    try:
        features = captured(config, attached, few, device)
        step, model = filling_step(config, attached, device), attached.model.to(device)
        with torch.no_grad():
            passes = (
                lambda: step.logits(model, few.to(device)),
                lambda: step.logits(head, features.to(device)),
                lambda: head.capture(lambda: step.logits(model, few.to(device)), whole=False),
            )
            whole, behind, filling = (_least(one, device) / len(few) for one in passes)
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        return Decision(False, "is not looked at: the device has not the memory for the model as it is")
    row = sum(t[0].numel() * t.element_size() for t in features.tensors)
    views = 1 + (config.dataset.hflip > 0)
    saved = config.optim.epochs * count * (whole - behind - row / READ)
    there = filled(features)
    taken = 0.0 if there else views * count * filling
    if saved <= taken:
        return Decision(False, f"would save {duration(max(saved, 0))} in all epochs, and take {duration(taken)}")
    folder = data.data_folder(config.dataset)
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    need, free = 0 if there else row * (views * count + others), shutil.disk_usage(disk).free
    if need > ROOM * free:
        return Decision(False, f"would take {need / MIB:,.0f} MiB, more than a tenth of what is free in {disk}")
    return Decision(
        True,
        f"saves {duration(saved)} in all epochs, and takes {duration(taken)} and {need / MIB:,.0f} MiB on the disk",
    )


def captured(config: DictConfig, attached: Attachment, images: Tensor, device: torch.device) -> Features:
    """Returns the features of images [B, 3, H, W], computed one image at a time, as any budget allows.

    They and the model are left on the CPU.
    """
    head, model, step = attached.feature_head, attached.model, filling_step(config, attached, device)
    assert head is not None
    model.to(device).eval()
    each = [functools.partial(step.logits, model, image.to(device)) for image in images.split(1)]
    parts = [head.capture(logits, whole=False)[0] for logits in each]
    model.to("cpu")
    return Features(torch.cat(tensors).cpu() for tensors in zip(*(part.tensors for part in parts)))


def _least(run: Callable[[], object], device: torch.device) -> float:
    """Returns the least seconds that run() takes."""

    def once() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    return min(once() for _ in range(1 + PASSES))
