"""What is behind frozen first blocks, trained on what these return: the gradient of the whole model, to the bit."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from layouts import BACKBONES, batch, make, make_attached
from torch import nn

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.methods.parts.tail import tail_of
from s2a_cli.training.run import attach, check_steady
from s2a_cli.training.step import moving_norms, train_mode

OF_BLOCKS = [
    (name, family)
    for name, kind in STRUCTURES.items()
    for family in kind.families
    if "blocks" in {field.name for field in fields(kind.Settings)}
]
WITHOUT = {
    "lst",
    "res_tuning_bypass",
    "qst",
    "unipt",
    "dtl",
    "dtl_plus",
    "hst",
    "s2a_paper",
}  # they read blocks themselves


def gradients(model: nn.Module, run, targets) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    losses_of(run(), targets).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method, family", OF_BLOCKS)
def test_its_gradient_is_that_of_the_whole_model(method, family):
    try:
        made = make_attached(family, method, blocks="last:1")
    except UserError as error:  # such as blocks without what it adapts
        pytest.skip(str(error))
    tail = tail_of(made.backbone)
    if tail is None or moving_norms(made.model):
        assert method in WITHOUT or moving_norms(made.model) or family == "mobilenet"
        return
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    train_mode(made.model)
    images, targets = batch(made.backbone)
    features, _ = tail.capture(lambda: made.model(images))
    alone, logits = tail.capture(lambda: made.model(images), whole=False)  # of which nothing is left behind
    assert not len(logits) and all(map(torch.equal, alone.tensors, features.tensors))
    expected = gradients(made.model, lambda: made.model(images), targets)
    found = gradients(made.model, lambda: tail(features), targets)
    assert found.keys() == expected.keys() and len(found) > 2
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_the_first_blocks_are_those_before_all_that_trains():
    def blocks(method, **settings):
        made = make_attached("vit", method, **settings)
        tail = tail_of(made.backbone)
        return len(tail.kept) if tail else 0

    assert [blocks("bias", blocks=f"last:{count}") for count in (1, 2, 3)] == [2, 1, 0]
    assert blocks("bias") == blocks("full") == blocks("prompt") == 0
    assert blocks("side") == blocks("linear") == 3  # nothing is in them; all of the branch's features are kept
    assert blocks("lora", blocks="last:1") == blocks("s2a", blocks="last:1") == 2
    made = make("vit")
    made.model.cls_token.requires_grad_(True)
    assert tail_of(made) is None, "a parameter of the model itself is in before all blocks"


def test_blocks_that_do_not_run_are_left_as_they_were():
    made = make_attached("vit", "bias", blocks="last:1")
    tail, images = tail_of(made.backbone), batch(made.backbone)[0]
    train_mode(made.model)
    features, logits = tail.capture(lambda: made.model(images))
    ran, first = [], made.backbone.block_modules[0]
    handle = first.attn.register_forward_hook(lambda *_: ran.append(1))
    own = lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)
    first.forward = own
    with torch.no_grad():
        assert torch.equal(tail(features), logits) and not ran and first.forward is own
        del first.forward
        with pytest.raises(RuntimeError):  # features of other shapes
            tail(type(features)([features.tensors[0][..., :3]]))
        assert torch.equal(made.model(images), logits) and ran
    assert all("forward" not in vars(block) for block in made.backbone.block_modules)
    handle.remove()


@pytest.mark.parametrize("family", BACKBONES)
def test_what_a_run_keeps_of_a_family_is_checked_first(family):
    config = compose(
        ["method=bias", "method.blocks=last:1", "quant=none", "dataset.cache=features", "dataset.scale=null"]
    )
    attached = attach(config, make(family))
    check_steady(attached)
    assert attached.feature_head.about[0] == "tail"


def test_blocks_that_are_given_more_than_a_hidden_state_are_refused():
    made = make_attached("vit", "bias", blocks="last:1").with_tail()
    model, first = made.model, made.backbone.block_modules[0]
    first.register_forward_hook(lambda block, args, output: setattr(model, "beside", output.mean()))
    model.blocks[2].norm1.register_forward_hook(lambda norm, args, output: output + model.beside)
    with pytest.raises(UserError, match="the blocks of VisionTransformer compute with more than"):
        check_steady(made)
