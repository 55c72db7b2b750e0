"""detach: a model that was moved or converted since is as it was found, where it is now."""

from __future__ import annotations

import copy

import pytest
import torch
from models import inputs, net
from torch.nn import functional as F

import s2a_cli


@pytest.mark.parametrize("method", ["bias", "full"])
def test_buffers_of_a_converted_model_keep_its_dtype_and_have_their_old_values(method):
    model, plain = net(), net().double()
    x = [one.double() for one in inputs(model)]
    attached = s2a_cli.attach(model, method, inputs=inputs(model))
    model.train()(*inputs(model))  # with `full` the statistics of BatchNorm change, before the conversion and after
    model.double()
    F.cross_entropy(model(*x), torch.zeros(4, dtype=torch.long)).backward()
    attached.detach()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]) and tensor.dtype == plain.state_dict()[name].dtype, name
    assert torch.equal(model.eval()(*x), plain.eval()(*x))


def test_a_merged_model_trains_what_it_trained_before_whatever_tensors_were_loaded_since():
    model = net()
    model.out[0].weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attached = s2a_cli.attach(model, "bias", inputs=inputs(model))
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    merged = attached.merge()
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == flags


@pytest.mark.parametrize("found", [True, False], ids=["in training", "in evaluation"])
def test_batch_norms_of_a_merged_model_follow_its_mode_again(found):
    model = net().train(found)
    own = model.units[1].norm.eval()  # as its owner has it
    attached = s2a_cli.attach(model, "bias", inputs=inputs(model))
    model.train()
    own.train(not found)
    model(*inputs(model))
    assert not any(unit.norm.training for unit in model.units), "held on their statistics"
    attached.merge()
    assert [unit.norm.training for unit in model.units] == [True, not found, True]


def test_models_that_share_modules_are_attached_to_one_at_a_time():
    one, other = net(), net()
    other.units = one.units
    attached = s2a_cli.attach(one, "bias", inputs=inputs(one))
    for model in (other, one.units):
        with pytest.raises(s2a_cli.UserError, match="attached to another model that has modules of this one"):
            s2a_cli.attach(model, "bias", inputs=inputs(one))
    s2a_cli.attach(copy.deepcopy(other), "bias", inputs=inputs(one))
    attached.detach()
    s2a_cli.attach(other, "bias", inputs=inputs(one)).merge()
    s2a_cli.attach(one, "bias", inputs=inputs(one))
