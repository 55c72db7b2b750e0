"""Measures accuracy over a split."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict

import torch
from torch import Tensor, nn

from s2a_cli import data
from s2a_cli.common import distributed
from s2a_cli.common.interrupts import guarded
from s2a_cli.results.metrics import mean_average_precision
from s2a_cli.training.run import Run
from s2a_cli.training.step import Step


class Scores(TypedDict):
    """What is measured over a split: figures in %, which are None where images have several labels, all but `map`."""

    loss: float  # mean
    top1: float | None
    top5: float | None  # None with fewer than six classes
    balanced: float | None  # mean over the classes of the accuracy on the images of each
    map: float | None  # mean average precision; None with one label an image


def chosen_by(run: Run) -> str:
    """Returns the figure by which the best epoch is chosen on validation."""
    if run.splits.multi_label:
        return "map"
    return "top1" if run.config.optim.balance == "none" else "balanced"


def describe(scores: Scores) -> str:
    """Returns the figures that a split is known by, to read: top-1 93.10 %."""
    if scores["map"] is not None or scores["top1"] is None:
        return "no mAP, as no image has a label" if scores["map"] is None else f"mAP {scores['map']:.2f} %"
    return f"top-1 {scores['top1']:.2f} %"


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
def accuracy(run: Run, loader: Iterable[tuple[Tensor, Tensor]], asked: Callable[[], bool] = lambda: False) -> Scores:
    """Returns the mean loss and the figures in % of a split, without class weights.

    Raises KeyboardInterrupt when it is asked to stop.
    """
    if run.splits.multi_label:
        return _multi_label(run, loader, asked)
    classes, five = len(run.splits.classes), len(run.splits.classes) > 5
    # Loss, top-1, top-5, and images and hits of each class are read once, at the end: the host does not wait for the
    # device. Counts in fp32 are exact.
    found = [torch.zeros(3 + 2 * classes, device=run.device)]
    for logits, targets in _outputs(run, loader, asked):
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        hits = logits.argmax(1) == targets
        top5 = (logits.topk(5).indices == targets[:, None]).sum() if five else torch.zeros_like(hits.sum())
        of_class = targets[:, None] == torch.arange(classes, device=run.device)
        counts = of_class.sum(0), (of_class & hits[:, None]).sum(0)
        found.append(torch.cat([torch.stack([loss, hits.sum(), top5]), *counts]))
    total = torch.stack(found).cpu().double().sum(0).tolist()
    loss, top1, top5, *by_class = distributed.all_reduce_sum(*total)
    images, correct = by_class[:classes], by_class[classes:]
    count, recalls = sum(images), [hit / of for hit, of in zip(correct, images) if of]
    return {
        "loss": loss / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count if five else None,
        "balanced": 100 * sum(recalls) / len(recalls),
        "map": None,
    }


def _multi_label(run: Run, loader: Iterable[tuple[Tensor, Tensor]], asked: Callable[[], bool]) -> Scores:
    pairs = [(logits.cpu(), targets.cpu()) for logits, targets in _outputs(run, loader, asked)]
    pairs = [pair for part in distributed.gather(pairs) for pair in part]
    logits, targets = (torch.cat(tensors) for tensors in zip(*pairs))
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets).item()
    return {
        "loss": loss,
        "top1": None,
        "top5": None,
        "balanced": None,
        "map": mean_average_precision(logits.numpy(), targets.numpy()),
    }


def _outputs(
    run: Run, loader: Iterable[tuple[Tensor, Tensor]], asked: Callable[[], bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits [B, classes] in fp32 and targets of each batch of this process, on the run's device."""
    run.model.eval()
    step = Step(run.config, run.device, run.attached)
    alone = distributed.rank_and_world_size()[1] == 1  # with others there is no stop before the sums that they wait for
    for images, targets in guarded(loader, asked):
        images, targets = sent(images, run.device), sent(targets, run.device)
        yield step.evaluated(run.trained, images), targets
        if alone and asked():
            raise KeyboardInterrupt
