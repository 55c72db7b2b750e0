"""One optimisation step: what it sets for the device that it runs on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from s2a_cli.config.compose import compose
from s2a_cli.training.step import Step, weight_dtype


@pytest.mark.parametrize(
    "precision, products, convolutions",
    [("fp32", "highest", False), ("tf32", "high", True), ("amp-bf16", "highest", False)],
)
def test_products_of_fp32_on_cuda_are_as_the_precision_says(monkeypatch, precision, products, convolutions):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not convolutions)
    before, config = torch.get_float32_matmul_precision(), compose([f"precision={precision}"])
    attached = SimpleNamespace(blocks=[])
    try:
        Step(config, torch.device("cpu"), attached)
        assert torch.get_float32_matmul_precision() == before, "a CPU has no TF32"
        Step(config, torch.device("cuda", 0), attached)
        assert torch.get_float32_matmul_precision() == products and torch.backends.cudnn.allow_tf32 == convolutions
    finally:
        torch.set_float32_matmul_precision(before)
    assert weight_dtype(precision) == torch.float32
