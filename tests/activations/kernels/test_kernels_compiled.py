"""Kernels compiled ahead of time, without a GPU, for what the launchers would launch: no spills, few registers and
little shared memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "kernels"))
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles", allow_module_level=True)
import resources

REGISTERS = 168  # a thread, of 255: three programs of four warps a multiprocessor
SHARED = 16 << 10  # bytes a program: what any GPU has for each of six
NORM = 45  # instructions an element of quantize_normalized, rows of 128 elements or more
NORM_AMD = 52  # where moving data among lanes takes more of them

TENSOR = resources.Like


def rows(width: int, count: int = 64 * 197) -> resources.Like:
    return TENSOR((count, width), (width, 1), torch.float32)


def quantize_normalized(width: int, bits: int = 4) -> resources.Call:
    bins, channels = TENSOR((4096,), (1,), torch.uint8), TENSOR((3, width), (width, 1), torch.float32)
    given = {"x": rows(width), "width": width, "eps": 1e-6, "centre": True, "bins": bins, "group": 64, "bits": bits}
    return "quantize_normalized", (*given.items(), ("chances", None), ("seed", 0), ("channels", channels))


def softmax_backward(width: int, bits: int = 4) -> resources.Call:
    count = 64 * 12 * width
    codes, scales = (
        TENSOR((count * width * bits // 8,), (1,), torch.uint8),
        TENSOR((count, -(-width // 64)), (-(-width // 64), 1), torch.bfloat16),
    )
    given = {
        "grad": rows(width, count),
        "codes": codes,
        "scales": scales,
        "levels": TENSOR((1 << bits,), (1,), torch.float32),
        "group": 64,
        "bits": bits,
    }
    return "softmax_backward", tuple(given.items())


def query() -> resources.Call:
    """One of q, k and v as it lies in what one layer makes."""
    x = TENSOR((64, 12, 197, 64), (197 * 2304, 64, 2304, 1), torch.float32)
    return "quantize_groupwise", (
        ("x", x),
        ("bins", TENSOR((4096,), (1,), torch.uint8)),
        ("low", -1.0),
        ("group", 64),
        ("bits", 4),
    )


def checked(call: resources.Call, arch: str, dtype: str) -> list[dict]:
    with resources.compiling(resources.TARGETS[arch]) as made:
        resources.replay(call, resources.DTYPES[dtype])
    found = [resources.resources(built) for built in made]
    assert found, "nothing was launched"
    for row in found:
        assert row["spills"] == 0 and row["registers"] <= REGISTERS and row["shared"] <= SHARED, row
    return found


@pytest.mark.parametrize("arch, dtype", [("sm_80", "fp32"), ("sm_90", "bf16"), ("gfx942", "fp16")])
def test_layer_norm_takes_few_instructions(arch, dtype):
    (found,) = checked(quantize_normalized(768), arch, dtype)
    assert found["an_element"] <= NORM


def test_a_softmax_map_and_a_view_of_a_query_need_no_copy():
    checked(softmax_backward(197), "sm_90", "bf16")
    checked(query(), "sm_90", "bf16")


def test_maps_of_a_window_with_codes_of_several_planes():
    """Swin's 49 positions are no multiple of 8, and codes of 5 or 7 bits lie in two or three planes."""
    for bits in (5, 7):
        checked(softmax_backward(49, bits), "sm_90", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("arch", resources.TARGETS)
def test_layer_norms_on_all_architectures(arch):
    for dtype, width in (("fp32", 128), ("fp16", 384), ("bf16", 1024)):
        (found,) = checked(quantize_normalized(width), arch, dtype)
        assert found["an_element"] <= (NORM if arch.startswith("sm_") else NORM_AMD), (width, dtype, found)


@pytest.mark.slow
def test_all_that_the_presets_launch():
    """Every call of a step of ViT-B and ResNet-50 has a kernel, within the limits.

    All presets: see benchmarks/kernels.
    """
    words = (
        "backbone=vit_b method=bias quant=paper",
        "backbone=vit_b method=bias quant=int5",
        "backbone=resnet50 method=bias quant=int4",
    )
    steps = {each: resources.calls(each.split()) for each in words}
    for arch, dtype in (("sm_90", "bf16"), ("gfx942", "fp16")):
        listed, plain = resources.table(steps, {arch: resources.TARGETS[arch]}, [dtype])
        assert not plain
        operators = {row["operator"] for row in listed}
        assert operators >= {
            "activate",
            "quantize_normalized",
            "norm_backward",
            "softmax_backward",
            "quantize_groupwise",
            "dequantize_groupwise",
            "max_pool2d",
        }
        for row in listed:
            assert row["spills"] == 0 and row["registers"] <= REGISTERS and row["shared"] <= SHARED, row


def test_a_call_that_no_kernel_covers_is_told():
    call = quantize_normalized(768)
    double = (call[0], tuple((key, "stochastic" if key == "chances" else value) for key, value in call[1]))
    with resources.compiling(resources.TARGETS["sm_90"]) as made, pytest.raises(resources.NoKernel):
        resources.replay(double, torch.float32)
    assert not made
