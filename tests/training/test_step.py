"""One optimisation step: what it sets for the device that it runs on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from s2a_cli.config.compose import compose
from s2a_cli.training import checkpoints, trainer
from s2a_cli.training.run import build
from s2a_cli.training.step import Step, train_mode, weight_dtype


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


CONVNET = ["backbone=timm", "backbone.timm=test_resnet", "backbone.name=r", "backbone.pretrained=false"]
CONVNET += ["backbone.kwargs={zero_init_last: false}"]


@pytest.mark.parametrize(
    "words",
    [
        *(["method=full"], ["method=bias", "quant=tiny"], ["method=s2a", "quant=int4"]),
        *(["method=bias", f"backbone.weights={kind}"] for kind in ("int8", "offload")),
        ["method=bias", "optim.micro_batch=2"],
    ],
)
def test_channels_last_changes_the_layout_of_maps_and_no_result(words):
    images, targets = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)

    def trained(last: bool):
        config = compose([*CONVNET, "quant=none", *words, f"backbone.channels_last={last}", "backbone.image_size=64"])
        attached, _ = build(config, 5)
        model, layouts = attached.model, []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
                )
        train_mode(model)
        Step(config, torch.device("cpu"), attached).accumulate(model, images, targets)
        return layouts, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (layouts, found), (before, expected) = trained(True), trained(False)
    assert layouts and all(layouts) and not all(before)
    exact = not any(word in ("quant=tiny", "quant=int4") for word in words)  # codes of other neighbours
    torch.testing.assert_close(found, expected, rtol=1e-3 if exact else 0.5, atol=1e-4 if exact else 0.05)


def test_a_run_with_channels_last_is_saved_and_goes_on(tmp_path):
    words = [*CONVNET, "backbone.channels_last=true", "backbone.image_size=32", "method=full", "dataset=digits"]
    config = compose([*words, "dataset.fraction=0.05", "optim.epochs=1", "quant=none", f"run_dir={tmp_path / 'run'}"])
    result, folder = trainer.train(config)
    assert result["status"] == "ok", result["error"]
    assert (folder / checkpoints.FILE).is_file()
