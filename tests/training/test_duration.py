"""How long a run will take on a CPU, predicted from a moment of its own training."""

from __future__ import annotations

import pytest
import torch

from s2a_cli.config.compose import compose
from s2a_cli.training import duration
from s2a_cli.training.run import prepare

QUICK = ["dataset=digits", "dataset.shots=8", "backbone=vit_micro", "optim.epochs=3", "device=cpu"]
pytestmark = pytest.mark.predicts


@pytest.mark.parametrize("words", [["method=s2a"], ["backbone=resnet18", "backbone.pretrained=false", "method=full"]])
def test_a_measurement_leaves_no_trace(words):
    """Neither in weights, moving statistics and gradients nor in random numbers."""
    run = prepare(compose([*QUICK, "backbone.image_size=32" if len(words) > 1 else "quant=int4", *words]))
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    before = torch.get_rng_state()
    pace = duration.measure(run)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert pace.train > 0 and 0 < pace.classify <= pace.train and pace.images <= 64


def test_the_time_is_that_of_the_images_that_are_left(monkeypatch):
    run = prepare(compose([*QUICK, "method=full", "quant=none"]))
    monkeypatch.setattr(duration, "measure", lambda run: duration.Pace(1.0, 3.0, 0.5, 8))
    train, val, test = (len(getattr(run.splits, split)) for split in ("train", "val", "test"))
    whole = 3 * (train * 4 + val * 1.5) + test * 1.5
    predicted = duration.predict(run)
    assert predicted.seconds == pytest.approx(whole)
    assert duration.predict(run, train).seconds == pytest.approx(whole - train * 4 - val * 1.5)
    said = predicted.describe()
    assert "on this CPU for 3 epochs (4 s an image, measured on 8)" in said
    assert "method=side dataset.cache=features dataset.scale=null about" in said
    assert predicted.faster[0][1] == pytest.approx((2 * train + val + test) * 1.5)


def test_operations_grow_with_the_image_and_the_backbone():
    """ViT-Ti/16 at 224 px: 1.08 G multiply-adds, as fvcore counts them for DeiT-Ti without the softmax."""
    small = duration.operations(compose(["backbone=vit_t", "backbone.image_size=112"]).backbone, 10)
    large = duration.operations(compose(["backbone=vit_t"]).backbone, 10)
    assert large / 2e9 == pytest.approx(1.08, rel=0.02) and 0.2 < small / large < 0.26
