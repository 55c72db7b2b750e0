"""The loss of a batch: cross-entropy, or binary cross-entropy where an image may have several labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from s2a_cli import data
from s2a_cli.config.schema import OptimConfig


@dataclass(frozen=True)
class Criterion:
    """Returns the mean loss over a batch of logits [B, classes] and targets, a scalar.

    Targets are labels [B], or shares of each class [B, classes] as mixup makes them. multi_label: targets are [B,
    classes] from 0 to 1, and the loss is the mean over classes as well. weights: [classes], of each class, in
    cross-entropy; of its positive examples in binary cross-entropy. A weighted batch is divided by its number of
    images, not by the sum of their weights, so that micro-batches add up to the same loss.
    """

    multi_label: bool = False
    label_smoothing: float = 0.0
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.multi_label:
            if self.label_smoothing:
                targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weights)
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits, targets, self.weights, reduction="none", label_smoothing=self.label_smoothing)
        return losses.mean()


def criterion_of(optim: OptimConfig, splits: data.Splits, device: torch.device) -> Criterion:
    """Returns the training loss of a run on these splits."""
    weights = None
    if optim.balance == "weights":
        found = data.class_weights(splits.train, len(splits.classes))
        weights = torch.tensor(found, dtype=torch.float32, device=device)
    return Criterion(splits.multi_label, optim.label_smoothing, weights)
