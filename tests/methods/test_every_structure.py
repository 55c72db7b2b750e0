"""Every structure on every family of backbones, through one common tester.

A new structure is held to it without a word here: what it promises stands in its class.
"""

from __future__ import annotations

import copy

import pytest
import torch
from layouts import BACKBONES, batch, loss_of, make, make_attached, quant

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES, Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.training import checkpoints
from s2a_cli.training.step import Step, moving_norms, train_mode

WEIGHTS = "0123456789ab"
CLAIMED = [(name, family) for name, kind in STRUCTURES.items() for family in kind.families]
OTHERS = [(name, family) for name, kind in STRUCTURES.items() for family in BACKBONES if family not in kind.families]


@pytest.mark.parametrize("method, family", CLAIMED)
def test_structure(method, family, tmp_path):
    made, plain = make_attached(family, method), make(family)
    at_start = logits(made)
    if STRUCTURES[method].starts_pretrained:
        expected = logits(plain)
        for branch in made.auxiliary:  # its classifiers are zero, and have their part in the mean
            at_start = at_start * (1 + branch.weight * len(branch.readers))
            torch.testing.assert_close(at_start, expected)
        assert made.auxiliary or torch.equal(at_start, expected)
        at_start = logits(made)
    twin = copy.deepcopy(made)
    check_steps(made, method)
    assert torch.equal(logits(twin), at_start), "a copy shares tensors with what it was copied from"
    change(twin, 0.3)
    assert not torch.allclose(logits(twin), at_start), "a copy does not compute with its own tensors"
    check_saved(made, method, family, tmp_path)
    check_kept_bytes(twin)
    check_merged(made, plain)


def check_steps(made: Attachment, method: str) -> None:
    """Two steps of a run, bit for bit those of a loop written out; all that trains moves, and nothing else."""
    stock = copy.deepcopy(made)
    for one in (made, stock):
        train_mode(one.model)
    before, norms = {name: t.clone() for name, t in made.model.state_dict().items()}, moving_norms(made.model)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    step = Step(compose([f"method={method}", "quant=none"]), torch.device("cpu"), made)
    ours, theirs = (
        torch.optim.SGD([p for p in one.model.parameters() if p.requires_grad], lr=0.1) for one in (made, stock)
    )
    felt = set()  # a gradient: one of a weight of 1 may be too small to move it
    for number in range(2):
        images, targets = batch(made.backbone)
        torch.manual_seed(number)
        loss = step(made.model, ours, images, targets)
        torch.manual_seed(number)
        expected = losses_of(stock.model(images), targets)
        expected.sum().backward()
        felt |= {name for name, p in stock.model.named_parameters() if p.grad is not None and p.grad.any()}
        theirs.step()
        theirs.zero_grad()
        for act in stock.after_step:
            act(theirs)
        assert torch.equal(loss, expected.mean())
    for (name, one), two in zip(made.model.state_dict().items(), stock.model.state_dict().values()):
        assert torch.equal(one, two), f"{name} is not what stock PyTorch makes it"
    moved = {name for name, t in made.model.state_dict().items() if not torch.equal(t, before[name])}
    statistics = {f"{name}.{b}" for name, m in made.model.named_modules() if m in norms for b, _ in m.named_buffers()}
    assert moved - statistics - set(named_buffers(made.model)) <= trained
    # the bias of a key moves no softmax, and a bias before a normalisation by batch statistics is taken off again
    biases = {name for name in trained if name.endswith("bias")}
    single = {f"s2a.side.readers.{i}.query" for i, b in enumerate(made.backbone.blocks) if b.output.positions == 1}
    idle = trained - felt - biases - single
    assert not idle, f"without influence on the loss: {sorted(idle)}"
    assert len(biases & moved) >= 0.5 * len(biases)


def check_saved(made: Attachment, method: str, family: str, folder) -> None:
    """What a run saves restores the function, and is no larger than what trains."""
    state = checkpoints.trainable_state(made.model)
    checkpoints.save(folder, state, {}, WEIGHTS)
    other = make_attached(family, method)
    checkpoints.load(folder, other.model, WEIGHTS)
    assert torch.equal(logits(other), logits(made))
    buffers = len(state) - sum(p.requires_grad for p in made.model.parameters()) - len(named_buffers(made.model))
    assert buffers == sum(len(list(norm.buffers())) for norm in moving_norms(made.model))
    assert (folder / checkpoints.FILE).stat().st_size < 4 * sum(t.numel() for t in state.values()) + 40_000


def named_buffers(model) -> list[str]:
    """Names of the buffers that modules say a run changes."""
    return [f"{prefix}.{name}" for prefix, m in model.named_modules() for name in getattr(m, checkpoints.TRAINED, ())]


def check_kept_bytes(made: Attachment) -> None:
    """Codes of 4 bits keep no more, but for masks of ReLUs before a trained convolution, which keeps all."""
    train_mode(made.model)
    exact, coded = (saved_bytes(lambda b=bits: loss_of(made.backbone, quant(b)), made.model) for bits in (None, 4))
    assert coded <= 1.01 * exact


def check_merged(made: Attachment, plain) -> None:
    """Where the structure says so, plain weights of the same names compute the same."""
    if made.unmergeable:
        with pytest.raises(UserError):
            made.merge()
        return
    change(made, 0.05)
    expected = logits(made)
    merged = made.merge()
    plain.model.load_state_dict(merged.state_dict(), strict=True)
    for found in (merged, plain.model):
        with torch.no_grad():
            torch.testing.assert_close(found.eval()(batch(plain)[0]), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method, family", OTHERS)
def test_a_backbone_that_does_not_fit_is_refused(method, family):
    with pytest.raises(UserError, match=f"method={method}: does not fit .*; it fits "):
        make_attached(family, method)


def logits(made) -> torch.Tensor:
    """In evaluation."""
    backbone = getattr(made, "backbone", made)
    with torch.no_grad():
        return backbone.model.eval()(batch(backbone)[0])


def change(made: Attachment, size: float) -> None:
    """Moves all that trains."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
