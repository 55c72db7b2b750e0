"""Copies of a model are models of their own: deepcopy, averages of weights, pickles."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layouts import batch, each_backbone, make
from torch.optim.swa_utils import AveragedModel

from s2a_cli.methods.parts.deep_supervision import losses_of

each_method = pytest.mark.parametrize("method", ["full", "bias", "s2a"])


def change(model, number: float) -> None:
    """All that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(number).mul_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


@each_backbone
@each_method
def test_a_copy_uses_its_own_parameters(backbone, method):
    made = make(backbone, method)
    model, (images, targets) = made.model.eval(), batch(made)
    with torch.no_grad():
        before, twin = model(images), copy.deepcopy(model)
        average = AveragedModel(model)
        change(model, 0.3)
        changed = model(images)
        assert not torch.allclose(changed, before)
        assert torch.equal(twin(images), before) and torch.equal(average.eval()(images), before)
        change(twin, 0.3)
        assert torch.equal(twin(images), changed)
    losses_of(twin.train()(images), targets).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())


@each_backbone
@pytest.mark.parametrize("method", ["prompt", "side", "s2a"])
def test_a_whole_model_can_be_saved(backbone, method):
    made, file = make(backbone, method), io.BytesIO()
    change(made.model, 0.3)
    images, _ = batch(made)
    torch.save(made.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # as a user of torch.save(model) does
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), made.model.eval()(images))


def test_a_model_whose_forward_pass_broke_off_can_be_copied():
    made = make("vit", "side")
    images, _ = batch(made)

    def breaks(*_):
        raise KeyboardInterrupt

    handle = made.model.blocks[1].register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        made.model.train()(images)
    handle.remove()
    twin = copy.deepcopy(made.model)
    with torch.no_grad():
        assert torch.equal(twin.eval()(images), made.model.eval()(images))
