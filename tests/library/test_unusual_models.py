"""attach to models that were pickled, made elsewhere, or are of several dtypes."""

from __future__ import annotations

import io

import torch
from models import inputs, vit
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
