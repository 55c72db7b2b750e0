"""s2a_cli.plan: how the steps of a loop of one's own fit a budget."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
from torch.nn import functional as F

import s2a_cli
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import QuantConfig
from s2a_cli.memory import track
from s2a_cli.memory.result import MIB
from s2a_cli.planner import plan as planning
from s2a_cli.planner.candidates import Candidate
from s2a_cli.planner.task import Task


def made(method: str = "s2a", **settings) -> s2a_cli.Attached:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=5)
    return s2a_cli.attach(model, method, **settings)


IMAGES, LABELS = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5


def step(attached: s2a_cli.Attached, chosen: s2a_cli.StepPlan | None = None):
    """A step as the documentation writes it."""
    count = chosen.micro_batch if chosen else len(IMAGES)
    memory = s2a_cli.compress_activations(chosen.quant if chosen else QuantConfig.named("none"), attached.blocks)

    def run(model, optimizer, images, labels, after_forward=lambda: None) -> None:
        for part, label in zip(images.split(count), labels.split(count)):
            with memory:
                loss = F.cross_entropy(model(part), label) * len(part) / len(images)
            after_forward()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def peak(attached: s2a_cli.Attached, chosen: s2a_cli.StepPlan | None = None) -> float:
    attached.model.train()
    batch = IMAGES, LABELS
    return track(
        attached.model, batch, step(attached, chosen), lambda m: torch.optim.AdamW(attached.parameters())
    ).peak_mib


@pytest.mark.parametrize("method", ["bias", "s2a"])
def test_a_loop_with_the_plan_keeps_to_the_budget(method, quick_plans):
    attached = made(method)
    whole = peak(attached)
    budget = f"{whole * 0.75:.1f}MiB"
    before = {name: tensor.clone() for name, tensor in attached.model.state_dict().items()}
    attached.model.eval()
    chosen = s2a_cli.plan(attached, IMAGES, LABELS, budget)
    assert not attached.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in attached.model.state_dict().items())
    assert all(p.grad is None for p in attached.model.parameters())
    assert chosen.micro_batch < len(IMAGES) or chosen.quant.recompute == "block" or chosen.quant.blocks
    assert peak(attached, chosen) <= whole * 0.75
    assert chosen.needed_mib <= whole * 0.75 + 0.1
    assert chosen.about in str(chosen) and "without planning" not in str(chosen)


@pytest.mark.parametrize("micro_batch", [12, 8])
def test_images_are_predicted_in_the_type_that_they_have(micro_batch):
    attached = made("bias")
    config = compose(["method=linear", f"optim.batch_size={len(IMAGES)}"])
    cut = s2a_cli.StepPlan(micro_batch, QuantConfig.named("none"), 0.0, "", {})  # pyright: ignore[reportArgumentType]
    task = Task(config, attached.attachment, 5, len(IMAGES), 1e9, dtype=IMAGES.dtype)
    assert task.needed(Candidate(micro_batch)) / MIB == pytest.approx(peak(attached, cut), abs=0.01)


def test_a_plan_leaves_the_gradient_as_it_is(quick_plans):
    attached = made("bias")
    chosen = s2a_cli.plan(attached, IMAGES, LABELS, f"{peak(attached) * 0.7:.1f}MiB")
    found = []
    for one in (None, chosen):
        attached.model.zero_grad()
        optimizer = torch.optim.SGD(attached.parameters(), lr=0.0)
        optimizer.zero_grad = lambda: None  # the gradient is what is looked at
        step(attached, one)(attached.model, optimizer, IMAGES, LABELS)
        found.append(torch.cat([p.grad.flatten() for p in attached.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_no_gradient_passes_the_blocks_before_the_first_that_trains():
    attached = made("bias", adapt="last:1")
    assert attached.attachment.passed_blocks() == attached.blocks[3:]


def test_what_can_not_be_planned_is_refused():
    attached = made("bias")
    with pytest.raises(s2a_cli.UserError, match=re.escape("expected [B, 3, 32, 32]")):
        s2a_cli.plan(attached, IMAGES[..., :16], LABELS, "1GiB")
    with pytest.raises(s2a_cli.UserError, match=r"attached: expected what s2a_cli\.attach returned, not VisionTrans"):
        s2a_cli.plan(attached.model, IMAGES, LABELS, "1GiB")  # pyright: ignore[reportArgumentType]
    with pytest.raises(s2a_cli.UserError, match="and a target for each"):
        s2a_cli.plan(attached, IMAGES, LABELS[:3], "1GiB")
    with pytest.raises(s2a_cli.UserError, match="budget=900"):
        s2a_cli.plan(attached, IMAGES, LABELS, "900")
    with pytest.raises(s2a_cli.UserError, match="fidelity=0.5"):
        s2a_cli.plan(attached, IMAGES, LABELS, "1GiB", fidelity="0.5")
    with pytest.raises(s2a_cli.UserError, match=r"budget=1MiB: nothing fits; the least .* [\d.]+ MiB"):
        s2a_cli.plan(attached, IMAGES, LABELS, "1MiB")


def test_a_batch_is_not_taken_for_the_whole_run(monkeypatch):
    """How long measurements may take depends on how long a run is, which a loop of one's own does not say."""
    known, measure = [], planning.measure
    monkeypatch.setattr(planning, "measure", lambda *args: known.append(args[-1]) or measure(*args))
    s2a_cli.plan(made("bias"), IMAGES, LABELS, "1GiB")
    assert known == [math.inf]
