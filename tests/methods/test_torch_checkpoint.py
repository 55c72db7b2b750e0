"""PyTorch's own checkpointing of blocks gives the gradients of a plain pass, or is refused: never other gradients."""

from __future__ import annotations

import pytest
import torch
from layouts import batch, loss_of, make
from test_copies import change
from timm.layers import set_reentrant_ckpt

import s2a_cli
from s2a_cli.common.errors import UserError
from s2a_cli.methods import STRUCTURES

REFUSED = {"dtl", "dtl_plus", "hst", "lst", "qst", "res_tuning_bypass", "s2a_paper", "vpt_shallow"}
REFUSED_REENTRANT = {*REFUSED, "s2a", "side", "unipt"}  # what they read goes to the logits beside the hidden state


def checkpointing(made, on: bool) -> None:
    made.model.set_grad_checkpointing(on)  # pyright: ignore[reportCallIssue] (timm's)


def gradients(made) -> dict[str, torch.Tensor]:
    """Those of a step in training, dropout as after the same seed."""
    made.model.zero_grad()
    torch.manual_seed(0)
    loss_of(made).backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


CASES = [
    (backbone, method)
    for method, kind in STRUCTURES.items()
    for backbone in kind.families
    if backbone == "vit" or method in REFUSED_REENTRANT
]


@pytest.mark.parametrize("backbone, method", CASES)
def test_gradients_are_those_of_a_plain_pass_or_it_is_refused(backbone, method):
    made = make(backbone, method)
    change(made.model, 0.3)
    made.model.train()
    plain = gradients(made)
    checkpointing(made, True)
    if method in REFUSED:
        with pytest.raises(UserError, match="set_grad_checkpointing"):
            gradients(made)
    else:
        # A branch reads what a checkpoint holds by itself, where it reads several blocks at once without: it rounds.
        slack = {"rtol": 1e-3, "atol": 5e-5} if method in ("s2a", "side") else {}
        torch.testing.assert_close(gradients(made), plain, **slack)
    checkpointing(made, False)
    torch.testing.assert_close(gradients(made), plain)  # nothing of it is left


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("method", sorted(REFUSED_REENTRANT))
def test_the_reentrant_kind_has_no_graph_of_what_is_handed_on(method):
    made = make("vit", method)
    images, _ = batch(made)
    made.model.train()
    checkpointing(made, True)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(UserError, match="set_grad_checkpointing"):
            made.model(images)
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize("graph", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("method", sorted(REFUSED_REENTRANT))
def test_modules_that_hold_several_blocks_would_lose_what_these_hand_on(method, graph):
    made = make("vit", method)
    images, _ = batch(made)
    made.model.train()
    plain = gradients(made)
    whole = s2a_cli.checkpointed([made.model.blocks], chunks=2)
    with torch.set_grad_enabled(graph), whole, pytest.raises(UserError, match=r"give attached\.blocks"):
        made.model(images)
    torch.testing.assert_close(gradients(made), plain)
    with s2a_cli.checkpointed(made.block_modules):
        loss = loss_of(made)
    made.model.zero_grad()
    loss.backward()
    assert {name for name, p in made.model.named_parameters() if p.grad is not None} == plain.keys()
