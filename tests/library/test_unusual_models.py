"""attach to models that were pickled, made elsewhere, or are of several dtypes."""

from __future__ import annotations

import io

import pytest
import torch
from models import inputs, vit
from torch import nn
from torch.utils.hooks import RemovableHandle

import s2a_cli


def test_hooks_of_an_unpickled_model_survive_those_of_a_new_process(monkeypatch):
    attached = s2a_cli.attach(vit(), "vpt_deep")
    for saved in (attached, attached.model):
        torch.save(saved, file := io.BytesIO())
        monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        model = loaded.model if isinstance(loaded, s2a_cli.Attached) else loaded
        taken = {number for module in model.modules() for number in module._forward_pre_hooks}
        hook = model.blocks[0].register_forward_pre_hook(lambda *_: None)
        assert taken and hook.id > max(taken)
        x = inputs(model)
        assert torch.equal(model(*x), attached.model(*x))


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Flatten(), torch.ones(1, 3, 4, 4)), nn.Linear(48, 5))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))


@torch.inference_mode()
def inferring() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (scripted, "torch.jit has scripted or traced"),
        (lazy, "lazy modules"),
        (inferring, "within torch.inference_mode"),
    ],
)
def test_models_that_nothing_can_be_attached_to(make, said):
    with pytest.raises(s2a_cli.UserError, match=said):
        s2a_cli.attach(make(), "linear", inputs=(1, 3, 4, 4))


def test_what_is_made_within_inference_mode_would_not_train():
    model = vit()
    with torch.inference_mode(), pytest.raises(s2a_cli.UserError, match="leave it before"):
        s2a_cli.attach(model)


@pytest.mark.parametrize("method", ["s2a", "lora"])
def test_what_is_added_is_where_the_model_is(method):
    if method == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    model, plain = vit(), vit()
    torch.manual_seed(3)
    wanted = s2a_cli.attach(plain, method).state_dict()
    torch.manual_seed(3)
    with torch.device("meta"):
        found = s2a_cli.attach(model, method).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model(*inputs(model))
