"""Reads figures of a training step that a GPU may still be at a step later, so that the host never waits for one."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Pending:
    """Times a step of `images` images that begins now; `number` is its place in the epoch, from 1."""

    def __init__(self, device: torch.device, number: int, images: int):
        self.number, self.images, self.is_late = number, images, device.type == "cuda"
        if self.is_late:
            self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._began.record()
        self._time = time.perf_counter()

    def ends(self, loss: Tensor) -> None:
        """Notes that all of the step is on its way to the device. loss: a scalar."""
        if self.is_late:
            self._loss = torch.empty(loss.shape, dtype=loss.dtype, device="cpu", pin_memory=True)
            self._loss.copy_(loss, non_blocking=True)
            self._ended.record()
        else:
            self._loss = loss
        self._time = time.perf_counter() - self._time

    def read(self) -> tuple[float, float]:
        """Returns (loss, seconds that the step took); waits until the device has done it."""
        if self.is_late:
            self._ended.synchronize()
            self._time = self._began.elapsed_time(self._ended) / 1000
        return self._loss.item(), self._time
