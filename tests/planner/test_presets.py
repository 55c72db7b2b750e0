"""Presets on real CPU tensors keep what is predicted, to the byte, and peak where it is predicted."""

from __future__ import annotations

import pytest
import torch

from s2a_cli import backbones, methods
from s2a_cli.backbones import frozen_weights
from s2a_cli.config.compose import compose
from s2a_cli.memory import predict, track
from s2a_cli.training import forecast, run
from s2a_cli.training.step import Step, make_optimizer, train_mode

TIERS = [  # at least how many times less than full fine-tuning in the same precision: ViT-B/16, 224 px, 64 images
    ("side", "tiny", "fp32", 14.0),
    ("side", "tiny quant.chunks=8", "fp32", 15.5),
    ("side", "tiny quant.chunks=8", "bf16", 15.5),
    ("bias", "tiny", "bf16", 8.0),
    ("s2a", "tiny", "fp32", 9.0),
    ("s2a", "tiny quant.chunks=8", "fp32", 12.0),
    ("s2a", "tiny quant.chunks=8", "bf16", 10.0),
    ("s2a method.segments=3", "none", "fp32", 3.3),  # half of what bias tuning takes, 1.6
]

CASES = [
    *(("bias", quant, "fp32") for quant in ("exact", "paper", "int4", "int5", "tiny")),
    ("s2a", "int4", "fp32"),
    ("s2a method.segments=2", "int4", "fp32"),
    ("side", "tiny", "fp32"),
    ("bias", "tiny", "int8"),
    ("s2a", "int4", "nf4"),
]


@pytest.mark.parametrize("method, quant, weights", CASES)
def test_what_is_predicted_is_what_real_tensors_take(method, quant, weights):
    config = compose(
        [*f"method={method}".split(), f"quant={quant}", "backbone.pretrained=false", f"backbone.weights={weights}"]
    )
    torch.manual_seed(0)
    backbone = backbones.build(config.backbone, 10)
    attached = methods.attach(config.method, backbone)
    train_mode(backbone.model)
    frozen_weights.store(backbone, weights)
    size = backbone.image.size
    batch = torch.randn(16, 3, size, size), torch.arange(16) % 10

    def counted(how):
        step = Step(config, torch.device("cpu"), attached)
        return how(backbone.model, batch, step, lambda model: make_optimizer(config.optim, model, attached))

    predicted, real = counted(predict), counted(track)
    assert predicted.kept_mib == real.kept_mib
    assert predicted.static_mib == real.static_mib
    assert predicted.peak_mib == pytest.approx(real.peak_mib, rel=0.03)


@pytest.mark.parametrize("method, quant, precision, times", TIERS)
def test_times_less_than_full_fine_tuning(method, quant, precision, times):
    words = ["backbone=vit_b", "dataset=cifar100", "optim.batch_size=64", f"precision={precision}"]
    config = compose([*words, *f"method={method}".split(), *f"quant={quant}".split()])
    backbone = backbones.build(config.backbone, 100, meta=True)
    attached = run.attach(config, backbone)
    full = forecast.predict_step(*forecast.full_finetuning(config, 100), 50_000).peak_mib
    assert full > times * forecast.predict_step(attached, config, 50_000).peak_mib
