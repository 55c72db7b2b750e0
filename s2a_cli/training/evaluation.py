"""Measures accuracy over a split."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn

from s2a_cli import data
from s2a_cli.common import distributed
from s2a_cli.common.interrupts import guarded
from s2a_cli.training.run import Run
from s2a_cli.training.step import Step


class Scores(TypedDict):
    """What is measured over a split."""

    loss: float  # mean
    top1: float  # %
    top5: float | None  # %; None with fewer than six classes


def judge(run: Run, top1: float | None) -> None:
    """Warns where a test accuracy in % is one that no training is needed for."""
    if (said := data.majority(run.splits, top1)) and distributed.is_main_process():
        print(f"s2a: {said}", file=sys.stderr)


def sent(batch: Tensor, device: torch.device) -> Tensor:
    """Returns a batch on the device.

    The host waits for a copy to CUDA no longer than until it is on its way: batches are pinned.
    """
    return batch.to(device, non_blocking=device.type == "cuda")


@torch.no_grad()
def accuracy(run: Run, loader: data.Loader, asked: Callable[[], bool] = lambda: False) -> Scores:
    """Returns mean loss, top-1 and top-5 in % over a split; top-5 is None with fewer than six classes.

    Raises KeyboardInterrupt when it is asked to stop.
    """
    run.model.eval()
    step = Step(run.config, run.device, run.attached)
    # Loss, top-1 and top-5 of each batch are read once, at the end: the host does not wait for the device.
    found = [torch.zeros(3, device=run.device)]
    count = 0
    five = len(run.splits.classes) > 5
    alone = distributed.rank_and_world_size()[1] == 1  # with others there is no stop before the sums that they wait for
    for images, targets in guarded(loader, asked):
        images, targets = sent(images, run.device), sent(targets, run.device)
        logits = step.logits(run.trained, images)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        top1 = (logits.argmax(1) == targets).sum()
        top5 = (logits.topk(5).indices == targets[:, None]).sum() if five else torch.zeros_like(top1)
        found.append(torch.stack([loss, top1, top5]))  # counts in fp32 are exact
        count += len(images)
        if alone and asked():
            raise KeyboardInterrupt
    loss, top1, top5, count = distributed.all_reduce_sum(*torch.stack(found).cpu().double().sum(0).tolist(), count)
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count if five else None}
