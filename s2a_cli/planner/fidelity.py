"""Measures on images of the run how near the gradient under a candidate's settings is to the exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from s2a_cli.planner.candidates import PLAIN, RECOMPUTED, Candidate
from s2a_cli.planner.timer import Timer
from s2a_cli.training.step import moving_norms

IMAGES = 8  # of the first batch
BACKOFF = 16.0  # by which the factor of a GradScaler is made smaller


class Fidelity:
    """Returns the cosine of a candidate's gradient, of all that trains, with the exact one; -1 for one not finite.

    timers: of the run, by how weights are stored. exact: how they are stored where they are exact.
    """

    def __init__(self, timers: Mapping[str | None, Timer], exact: str | None):
        self.timers, self.exact = timers, exact
        self._exact: dict[int, Tensor] = {}

    def __call__(self, candidate: Candidate) -> float:
        size = min(candidate.micro_batch, IMAGES)
        if size not in self._exact:
            timer = self.timers[self.exact]
            total = max(1, len(timer.attached.blocks))
            alike = timer.blocks and not moving_norms(timer.attached.model)  # parts of a batch
            mode = RECOMPUTED if alike else PLAIN
            self._exact[size] = _gradient(timer, Candidate(size, mode, total, total), size)
        found = _gradient(self.timers[candidate.weights], candidate, size)
        cosine = torch.cosine_similarity(found, self._exact[size], dim=0).item()
        return cosine if math.isfinite(cosine) else -1.0


def _gradient(timer: Timer, candidate: Candidate, size: int) -> Tensor:
    """Returns the gradient of all that trains on the first images, `size` at a time, as one float64 vector.

    Under the same random numbers each time. Of fp16 it is as it comes, multiplied by the scaler's factor, which is made
    smaller where it overflows, as a run does.
    """
    scaler = timer.step(candidate).scaler
    found = _scaled_gradient(timer, candidate, size)
    while scaler.is_enabled() and not found.isfinite().all() and scaler.get_scale() > 1:
        scaler.update(scaler.get_scale() / BACKOFF)
        found = _scaled_gradient(timer, candidate, size)
    return found


def _scaled_gradient(timer: Timer, candidate: Candidate, size: int) -> Tensor:
    step, model = timer.step(candidate), timer.trained
    model.zero_grad(set_to_none=True)
    torch.manual_seed(timer.config.seed)
    for start in range(0, IMAGES, size):
        count = min(size, IMAGES - start)
        step.accumulate(model, *timer.take(count, start), count / IMAGES)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([_flat(p) for p in trained])
    model.zero_grad(set_to_none=True)
    return found


def _flat(parameter: Tensor) -> Tensor:
    grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return grad.flatten().cpu().double()
