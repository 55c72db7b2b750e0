"""No two threads write the same address, and none reads what another writes; run as test_kernels.py says.

The interpreter runs programs one after the other, so that a race would go unseen there. Its loads and stores are
watched instead.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from test_kernels import channelled, normal, table_of

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
here = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_under_the_interpreter")
if os.environ.get("TRITON_INTERPRET") == "1":
    from s2a_cli.activations.kernels import launch


@triton.jit
def overlapping(x):
    """Two elements of each program are the next one's, too."""
    place = tl.program_id(0) * 2 + tl.arange(0, 4)
    tl.store(x + place, 1.0, place < 8)


class Watch:
    """The addresses that each launch wrote and read; `launches` counts those that wrote."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import interpreter_builder as builder

        self.builder, self.launches = builder, 0
        self.writes, self.reads = [], []
        for name in (
            "set_grid_dim",
            "create_masked_store",
            "create_masked_load",
            "create_atomic_rmw",
            "create_atomic_cas",
        ):
            monkeypatch.setattr(builder, name, getattr(self, name)(getattr(builder, name)))

    def set_grid_dim(self, inner):
        def begins(*grid):
            self.check()
            inner(*grid)

        return begins

    def create_masked_store(self, inner):
        def store(pointers, value, mask, *rest):
            self.writes.append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel())
            return inner(pointers, value, mask, *rest)

        return store

    def create_masked_load(self, inner):
        def load(pointers, mask, *rest):
            self.reads.append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel())
            return inner(pointers, mask, *rest)

        return load

    def create_atomic_rmw(self, inner):
        return lambda *args: pytest.fail("an atomic operation: sums depend on the order of programs")

    create_atomic_cas = create_atomic_rmw

    def check(self):
        """What the last launch did."""
        if self.writes:
            writes = np.concatenate(self.writes)
            assert len(np.unique(writes)) == len(writes), "an address is written twice"
            reads = np.concatenate(self.reads) if self.reads else writes[:0]
            assert not np.intersect1d(reads, writes).size, "an address is read and written"
            self.launches += 1
        self.writes, self.reads = [], []


@here
def test_no_kernel_races(monkeypatch):
    bits = 7  # planes of 4, 2 and 1
    monkeypatch.setattr(launch, "EACH", 2)
    monkeypatch.setattr(launch, "PROGRAMS", 3)
    signed, unit, wide = table_of(bits, -1.0), table_of(bits, 0.0), table_of(bits, -16.0, 16.0)
    watch = Watch(monkeypatch)
    for count, width in ((37, 64), (13, 200), (21, 49)):
        x = normal(count, width)
        codes = launch.quantize_elementwise(x, wide.bin_codes, wide.low, wide.high, bits)
        launch.multiply_dequantized(x, codes, wide.entries, bits)
        launch.activate(x, "silu", wide.bin_codes, wide.low, wide.high, bits)
        launch.pack_interval(x, 0.0, 6.0)
        codes, scales = launch.quantize_groupwise(x.abs(), unit.bin_codes, 0.0, 64, bits)
        launch.dequantize_groupwise(codes, scales, unit.entries, width, 64, bits, 5, count, torch.bfloat16)
        launch.softmax_backward(x, codes, scales, unit.entries, 64, bits)
        launch.weight_gradient(x[:, :3], codes, scales, unit.entries, width, 64, bits)
        launch.dequantize_int8(
            torch.zeros(count, width, dtype=torch.int8), torch.ones(count, 1, dtype=torch.bfloat16), torch.float16
        )
        if width % 8 == 0:
            channels = channelled(width)
            kept = launch.quantize_normalized(x, width, 1e-5, True, signed.bin_codes, 64, bits, None, 0, channels)
            launch.norm_backward(x, *kept, signed.entries, x[0], width, width, width, True, 64, bits, channels)
            launch.quantize_groupwise(normal(5, 3, 7, width).transpose(1, 2), signed.bin_codes, -1.0, 64, bits)
    for window in ([3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 2], [2, 2], [0, 0], [1, 1], True):
        x = normal(2, 3, 9, 11)
        out, packed = launch.max_pool2d(x, *window)
        launch.max_pool2d_backward(out, packed, list(x.shape), *window)
    watch.check()
    assert watch.launches >= 3 * 9 + 2 * 3 + 4


@here
def test_a_race_would_be_seen(monkeypatch):
    watch = Watch(monkeypatch)
    overlapping[(3,)](torch.zeros(8))
    with pytest.raises(AssertionError, match="written twice"):
        watch.check()
