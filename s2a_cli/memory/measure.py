"""Measures the memory of training steps as CUDA's caching allocator counts it; evaluation is not measured."""

from __future__ import annotations

import sys

import torch

from s2a_cli.memory import device as busy
from s2a_cli.memory.result import MIB, Memory


def meter(device: torch.device, warmup: int = 3) -> CudaMeter | None:
    """Returns a meter of the memory of steps; None where nothing can be measured, and the prediction stands.

    warmup: steps that are not measured.
    """
    if device.type != "cuda":
        return None
    if busy.is_idle(device):
        return CudaMeter(device, warmup)
    print(f"s2a: other processes compute on {device}: the peak in the result stays the predicted one", file=sys.stderr)
    return None


class CudaMeter:
    """Watches the steps of a training loop from outside and keeps the highest figures after the warm-up.

    A step is `step_begins()`, images to the device, forward, `after_forward()`, backward, update, `step_ends()`.
    Gradients must be released (set to None) between steps, and nothing of a step, such as its images, be alive when
    the next begins. The allocator counts on the host and in the order of the calls: nothing needs to be synchronised.
    """

    def __init__(self, device: torch.device, warmup: int = 3) -> None:
        self._device = device
        self._warmup = warmup  # steps, in which the optimiser's state is made and cuDNN chooses algorithms
        self._steps = 0
        self._static = self._kept = self._peak = self._reserved = 0  # bytes

    def step_begins(self) -> None:
        """Notes what is allocated between steps."""
        self._after_forward_seen = False
        if self._steps >= self._warmup:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._begin = torch.cuda.memory_allocated(self._device)
            self._static = max(self._static, self._begin)

    def after_forward(self) -> None:
        """Notes what a forward pass has kept, of several micro-batches the first.

        Later ones find gradients beside what is kept.
        """
        if self._steps >= self._warmup and not self._after_forward_seen:
            self._kept = max(self._kept, torch.cuda.memory_allocated(self._device) - self._begin)
            self._after_forward_seen = True

    def step_ends(self) -> None:
        """Notes the peak of the step."""
        if self._steps >= self._warmup:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
        self._steps += 1

    @property
    def memory(self) -> Memory | None:
        """The figures so far; None until a step after the warm-up has ended."""
        if self._steps <= self._warmup:
            return None
        return Memory(
            "measured-cuda",
            peak_mib=self._peak / MIB,
            static_mib=self._static / MIB,
            kept_mib=self._kept / MIB,
            reserved_mib=self._reserved / MIB,
        )
