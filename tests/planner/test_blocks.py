"""Single blocks that are timed for a plan: which are alike, how one runs, what costs follow, what is left behind."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from s2a_cli import backbones
from s2a_cli.activations import ActivationMode
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.planner import measure
from s2a_cli.planner.blocks import Blocks, kinds_of
from s2a_cli.planner.candidates import MODES, PLAIN, RECOMPUTED, Candidate, Mode
from s2a_cli.planner.measure import BLOCK_SECONDS, measure_blocks
from s2a_cli.planner.timer import Timer
from s2a_cli.training.run import attach

UNTRAINED = ["backbone.pretrained=false", "device=cpu", "optim.batch_size=8"]
VIT = ["backbone=vit_micro", "+backbone.kwargs.depth=3"]
SMALL = ["backbone.image_size=128", "+backbone.kwargs.embed_dim=12"]
SWIN = ["backbone=swin_t", *SMALL, "+backbone.kwargs.depths=[2,4]", "+backbone.kwargs.num_heads=[2,2]"]
RESNET = ["backbone=resnet18", "backbone.image_size=32"]
CONVNEXT = ["backbone=convnext_t", "backbone.image_size=32", "+backbone.kwargs.depths=[1,1,6,2]"]
CODED = next(mode for mode in MODES if mode.name == "int4")
SIZES = [1, 2, 4, 8, 16, 32, 64]


def timer_of(*words: str) -> Timer:
    config = compose([*words, *UNTRAINED])
    torch.manual_seed(0)
    attached = attach(config, backbones.build(config.backbone, 10))
    size = attached.backbone.image.size
    progress = Progress("", None, "", quiet=True).__enter__()
    batch = torch.randn(8, 3, size, size), torch.arange(8)
    return Timer(config, attached, batch, torch.device("cpu"), progress)


def blocks_of(timer: Timer, images: int = 2) -> Blocks:
    kinds = kinds_of(timer, Candidate(images), images)
    assert kinds is not None
    return Blocks(timer, kinds)


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ([*VIT, "method=bias"], [[0, 1, 2]]),
        ([*VIT, "method=s2a"], [[0, 1, 2]]),  # hooks on blocks stay out of what is timed
        ([*VIT, "method=bias", "method.blocks=last:1"], [[0, 1], [2]]),
        ([*VIT, "method=lora", "method.blocks=last:1"], [[0, 1], [2]]),
        ([*SWIN, "method=bias"], [[0], [1], [2, 4], [3, 5]]),  # every other one has its windows shifted
        ([*RESNET, "method=bias"], [[0, 1], [2], [3], [4], [5], [6], [7]]),
        ([*CONVNEXT, "method=bias"], [[0], [1], [2, 3, 4, 5, 6, 7], [8, 9]]),
    ],
    ids=lambda value: " ".join(value[::2]) if isinstance(value[0], str) else "",
)
def test_blocks_of_one_kind_are_alike(words, places):
    assert [kind.places for kind in blocks_of(timer_of(*words)).kinds] == places


def test_blocks_whose_settings_differ_are_of_two_kinds():
    timer = timer_of(*VIT, "method=bias")
    cast(nn.Module, timer.attached.blocks[1]).window_size = (7, 7)
    assert [kind.places for kind in blocks_of(timer).kinds] == [[0, 2], [1]]
    cast(Any, timer.attached.blocks[2]).rate = 0.5  # as the rates of stochastic depth do
    assert [kind.places for kind in blocks_of(timer).kinds] == [[0, 2], [1]]


def test_a_block_that_stands_for_nothing_by_itself_is_not_timed(monkeypatch):
    timer = timer_of(*VIT, "method=bias")
    first, second, third = timer.attached.blocks
    with monkeypatch.context() as patched:
        patched.setattr(second, "forward", lambda x: first(x))  # which runs twice
        assert kinds_of(timer, Candidate(1), 1) is None
    with monkeypatch.context() as patched:
        own = third.forward
        patched.setattr(third, "forward", lambda x, beside: own(x + beside))
        hook = third.register_forward_pre_hook(lambda block, args: (*args, torch.ones(1)))
        assert kinds_of(timer, Candidate(1), 1) is None, "it is given several tensors"
        hook.remove()
    assert kinds_of(timer, Candidate(1), 1) is not None


def test_a_block_runs_as_in_a_step():
    """Recomputed it runs twice; codes are fitted in the first pass and in no other; nothing takes more images."""
    timer = timer_of(*VIT, "method=bias")
    blocks, ran = blocks_of(timer), []
    (kind,) = blocks.kinds
    hook = cast(nn.Module, kind.block.norm1).register_forward_hook(lambda norm, args, output: ran.append(len(output)))

    def runs(mode: Mode, images: int) -> list[int]:
        """Returns the images of each run of the block, whose first pass in the mode was before."""
        ran.clear()
        assert blocks(mode, images) is not None
        return list(ran)

    for mode in MODES:
        blocks(mode, 4)
    assert runs(PLAIN, 4) == [4] and runs(RECOMPUTED, 4) == [4, 4] and runs(PLAIN, 8) == [8]
    chunked = next(mode for mode in MODES if mode.cuts and mode.recomputes)
    assert runs(chunked, 8) == [1] * 16
    memory = blocks._memories[0, CODED]
    assert isinstance(memory, ActivationMode)
    fitted = {site: found.clone() for site, found in memory.calibration.fitted().items()}
    for _ in range(5):
        blocks(CODED, 4)
    again = memory.calibration.fitted()
    assert fitted.keys() == again.keys() and fitted and all(torch.equal(again[site], fitted[site]) for site in fitted)
    hook.remove()


def test_frozen_blocks_run_forward_alone():
    timer = timer_of(*VIT, "method=linear")
    blocks = blocks_of(timer)
    assert not any(kind.needs_grad for kind in blocks.kinds)
    assert blocks(PLAIN, 2) is not None and blocks(RECOMPUTED, 2) is not None


@pytest.mark.parametrize("words", [[*VIT, "method=s2a"], [*CONVNEXT, "method=bias"]], ids=["vit", "convnext"])
def test_a_model_is_left_as_it_was(words, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 600.0)  # all modes are timed, however busy the machine is
    monkeypatch.setattr(measure, "BLOCK_ROUNDS", 1)
    monkeypatch.setattr(measure, "SLOW", 0.0)  # blocks are timed, however fast they are
    timer = timer_of(*words)
    model = timer.attached.model

    def state() -> dict[str, Any]:
        modules = list(model.modules())
        return {
            "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "trained": [p.requires_grad for p in model.parameters()],
            "modes": [module.training for module in modules],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in modules],
            "random": torch.get_rng_state(),
        }

    before = state()
    costs = measure.measure(timer, [1, 2], MODES, lambda candidate: True)
    after = state()
    assert set(costs.extra) == set(MODES) - {PLAIN} and costs.stock[1] > 0
    assert sum(costs.shares) == pytest.approx(1.0) and len(costs.shares) == len(timer.attached.blocks)
    assert all(torch.equal(after["tensors"][name], tensor) for name, tensor in before["tensors"].items())
    assert torch.equal(before["random"], after["random"])
    assert all(before[key] == after[key] for key in ("trained", "modes", "hooks"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_whole_passes_are_timed_where_they_are_fast_or_blocks_tell_nothing(monkeypatch):
    def refused(*arguments: object) -> None:
        raise AssertionError("blocks are timed")

    monkeypatch.setattr(measure, "measure_blocks", refused)
    monkeypatch.setattr(measure, "measure_passes", lambda *arguments: "passes")
    timer = timer_of(*VIT, "method=bias")
    monkeypatch.setattr(measure, "SLOW", float("inf"))
    assert measure.measure(timer, SIZES, MODES, lambda candidate: True) == "passes"
    monkeypatch.setattr(measure, "SLOW", 0.0)
    with pytest.raises(AssertionError, match="blocks are timed"):
        measure.measure(timer, SIZES, MODES, lambda candidate: True)
    assert measure.measure(timer, SIZES, MODES, lambda candidate: False) == "passes"
    for odd in (["method=full"], ["method=bias"]):  # BatchNorms train; no two blocks are alike but the first
        assert measure.measure(timer_of(*RESNET, *odd), SIZES, MODES, lambda candidate: True) == "passes"
    monkeypatch.setattr(measure, "kinds_of", lambda *arguments: None)
    assert measure.measure(timer, SIZES, MODES, lambda candidate: True) == "passes"


@pytest.mark.parametrize(("threads", "seconds"), [(1, 2.0), (2, 5.0)])
def test_others_on_the_core_of_one_thread_take_no_time_from_it(threads, seconds, monkeypatch):
    now = {"process": 0.0, "wall": 0.0}
    clocks = SimpleNamespace(process_time=lambda: now["process"], perf_counter=lambda: now["wall"])
    monkeypatch.setattr("s2a_cli.planner.timer.time", clocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert timer_of(*VIT, "method=bias").seconds(lambda: now.update(process=2.0, wall=5.0), "") == seconds


class Clocked:
    """Stands for twelve blocks of two kinds whose times are known, of which the second takes twice as long."""

    total = 12

    def __init__(self, seconds, monkeypatch):
        self.kinds, self.seconds, self.now, self.calls = [None, None], seconds, 0.0, []
        monkeypatch.setattr("s2a_cli.planner.measure.time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, mode: Mode, images: int) -> float:
        """Returns the seconds of ten blocks of one kind and two of the other."""
        self.calls.append((mode, images))
        self.now += self.turn(mode, images)
        return (10 + 2 * 2) * self.seconds(mode, images)

    def turn(self, mode: Mode, images: int) -> float:
        return (1 + 2) * self.seconds(mode, images)

    def shares(self, mode: Mode, images: int) -> list[float]:
        return [1 / 14] * 10 + [2 / 14] * 2


def slow(mode: Mode, images: int) -> float:
    """The seconds of a block of ViT-B on one core; lossless savings are faster for 8 images."""
    more = {PLAIN: 1.0, MODES[1]: 0.94 if images >= 8 else 1.02}.get(mode, 1.35)
    return 0.03 * images * more


def test_costs_are_those_of_the_blocks_and_of_what_is_beside_them(monkeypatch):
    clock = Clocked(slow, monkeypatch)
    found = measure_blocks(cast(Blocks, clock), PLAIN, 0.5, SIZES, MODES[:4], lambda candidate: True)
    assert found.stock == pytest.approx({n: 0.5 * n for n in found.stock}) and max(found.stock) >= 8
    blocks = 14 * 0.03 / 0.5  # their part of a pass
    assert found.extra[MODES[1]][1] == pytest.approx(0.02 * blocks)
    assert found.extra[MODES[1]][8] == pytest.approx(-0.06 * blocks)
    assert found.extra[RECOMPUTED] == pytest.approx({1: 0.35 * blocks}), "what is slow is timed in one size"
    assert clock.now <= BLOCK_SECONDS and min(clock.calls.count(one) for one in clock.calls) >= 3
    turns = [one for one in clock.calls if one[1] <= 2]
    assert all(one != other for one, other in itertools.pairwise(turns)), "in turn"


def test_what_is_nearly_as_fast_as_the_fastest_is_timed_most(monkeypatch):
    def overhead(mode: Mode, images: int) -> float:
        return (0.02 + 0.03 * images) * (1.0 if mode == PLAIN else 1.35)

    clock = Clocked(overhead, monkeypatch)
    found = measure_blocks(cast(Blocks, clock), PLAIN, 0.9, SIZES, MODES[:4], lambda candidate: True)
    counts = {images: clock.calls.count((PLAIN, images)) for images in found.stock}
    assert counts[2] == 2 < counts[8] and clock.now <= BLOCK_SECONDS, counts


def test_what_is_faster_by_noise_is_as_fast(monkeypatch):
    def noisy(mode: Mode, images: int) -> float:
        return 0.03 * images * (0.995 if mode != PLAIN else 1.0)

    found = measure_blocks(cast(Blocks, Clocked(noisy, monkeypatch)), PLAIN, 0.5, SIZES, MODES[:4], lambda one: True)
    assert all(more == 0 for extra in found.extra.values() for more in extra.values())


def test_only_what_fits_is_timed(monkeypatch):
    clock = Clocked(slow, monkeypatch)
    found = measure_blocks(
        cast(Blocks, clock), RECOMPUTED, 0.6, SIZES, MODES[:4], lambda one: bool(one.mode.recomputes) or not one.blocks
    )
    assert {images for mode, images in clock.calls if mode == MODES[1]} == {1}, "one block in the smallest size fits"
    assert found.stock[1] == pytest.approx(14 * 0.03 + 0.6 - 1.35 * 14 * 0.03)
    nothing_larger = Clocked(slow, monkeypatch)
    measure_blocks(
        cast(Blocks, nothing_larger), PLAIN, 0.5, SIZES, MODES[:4], lambda candidate: candidate.micro_batch == 1
    )
    assert {images for _, images in nothing_larger.calls} == {1}


def test_a_short_run_is_measured_for_a_short_time(monkeypatch):
    clock = Clocked(slow, monkeypatch)
    found = measure_blocks(cast(Blocks, clock), PLAIN, 0.5, SIZES, MODES, lambda candidate: True, most=2.0)
    assert found and clock.now < 2.5 and set(found.stock) == {1, 2}, "of one size nothing is known of larger ones"


def test_a_device_without_the_memory_for_a_block_has_no_costs(monkeypatch):
    clock = Clocked(slow, monkeypatch)
    monkeypatch.setattr(Clocked, "__call__", lambda *arguments: None)
    assert measure_blocks(cast(Blocks, clock), PLAIN, 0.5, SIZES, MODES, lambda candidate: True) is None
