"""Several threads run one model at a time: what hooks hand on is of the thread that they run in."""

from __future__ import annotations

import threading

import pytest
import torch
from layouts import batch, make
from test_copies import change

from s2a_cli.methods import STRUCTURES

BLOCKED = ("blocks.1", "blocks.1.attn", "blocks.1.mlp")  # where a thread is made to wait, within a pass of another
VIT = [name for name, kind in STRUCTURES.items() if "vit" in kind.families]


@pytest.mark.parametrize("method", VIT)
def test_a_pass_does_not_see_that_of_another_thread(method):
    made = make("vit", method)
    model, (images, _) = made.model.eval(), batch(made)
    change(model, 0.3)
    others = images.flip(0) * 2
    with torch.no_grad():
        alone = model(images), model(others)
    slow, found = threading.get_ident(), []

    def other_pass() -> None:
        with torch.no_grad():
            found.append(model(others))

    def on_inputs(module: torch.nn.Module, args: tuple) -> None:
        if threading.get_ident() == slow:
            other = threading.Thread(target=other_pass)
            other.start()
            other.join()

    hooks = [model.get_submodule(name).register_forward_pre_hook(on_inputs) for name in BLOCKED]
    with torch.no_grad():
        mine = model(images)
    for hook in hooks:
        hook.remove()
    assert torch.equal(mine, alone[0])
    assert len(found) == len(BLOCKED) and all(torch.equal(one, alone[1]) for one in found)


@pytest.mark.parametrize("method", sorted({*VIT} - {"c3a"}))  # peft's own convolution needs an image
def test_no_image_gives_no_logits(method):
    made = make("vit", method)
    images, _ = batch(made)
    with torch.no_grad():
        assert made.model.eval()(images[:0]).shape == (0, 7)
