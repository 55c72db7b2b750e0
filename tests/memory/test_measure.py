"""The CUDA meter against a made-up allocator: which figures it takes, and when."""

from __future__ import annotations

import pytest
import torch

from s2a_cli.memory import CudaMeter, is_idle
from s2a_cli.memory.result import MIB

DEVICE = torch.device("cuda", 0)


class Allocator:
    """Stands in for what torch.cuda reports, in MiB."""

    def __init__(self, monkeypatch):
        self.allocated = self.peak = self.reserved = 0
        self.resets = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated * MIB)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak * MIB)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.reserved * MIB)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device):
        assert device == DEVICE
        self.resets += 1
        self.peak = self.allocated

    def use(self, allocated):
        self.allocated = allocated
        self.peak = max(self.peak, allocated)
        self.reserved = max(self.reserved, self.peak + 50)


def step(meter, allocator, static, forwards, backward):
    allocator.use(static)
    meter.step_begins()
    for allocated in forwards:
        allocator.use(allocated)
        meter.after_forward()
    allocator.use(backward)
    allocator.use(static)
    meter.step_ends()


def test_reports_the_highest_step_after_the_warm_up(monkeypatch):
    allocator = Allocator(monkeypatch)
    meter = CudaMeter(DEVICE, warmup=3)
    for _ in range(3):
        step(meter, allocator, 100, [5000], 9000)
        assert meter.memory is None
    assert allocator.resets == 0
    step(meter, allocator, 300, [1300], 1500)
    step(meter, allocator, 300, [700], 800)  # a short last batch
    memory = meter.memory
    assert (memory.kind, memory.peak_mib, memory.static_mib, memory.kept_mib) == ("measured-cuda", 1500, 300, 1000)
    assert memory.reserved_mib == 9050
    assert allocator.resets == 2


def test_of_micro_batches_the_first_tells_what_is_kept(monkeypatch):
    allocator = Allocator(monkeypatch)
    meter = CudaMeter(DEVICE, warmup=0)
    step(meter, allocator, 300, [400, 450, 460], 500)
    assert (meter.memory.kept_mib, meter.memory.peak_mib) == (100, 500)


def test_evaluation_between_steps_does_not_count(monkeypatch):
    allocator = Allocator(monkeypatch)
    meter = CudaMeter(DEVICE, warmup=0)
    step(meter, allocator, 300, [400], 500)
    allocator.use(7000)
    step(meter, allocator, 300, [400], 500)
    assert meter.memory.peak_mib == 500


@pytest.mark.parametrize(
    "used, reserved, idle", [(500, 0, True), (8500, 8000, True), (1500, 0, False), (9500, 8000, False)]
)
def test_a_device_is_idle_when_only_this_process_uses_it(monkeypatch, used, reserved, idle):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80_000 - used) * MIB, 80_000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * MIB)
    assert is_idle(DEVICE) is idle
