"""detach: a model that was moved or converted since is as it was found, where it is now."""

from __future__ import annotations

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
