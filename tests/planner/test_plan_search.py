"""The search for a plan: against all candidates tried one by one, for memory and time of a made-up model."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import cast

import pytest

from s2a_cli.planner import plan
from s2a_cli.planner.candidates import EXACT, MODES, PLAIN, RECOMPUTED, Candidate, micro_batches
from s2a_cli.planner.costs import Costs, assumed
from s2a_cli.planner.measure import SECONDS, SHORT_RUN, measure_passes
from s2a_cli.planner.search import Found, Room, how_many, plans
from s2a_cli.planner.timer import Timer

BATCH, BLOCKS = 64, 12
KEPT = dict(zip(MODES, (1.0, 0.9, 0.1, 0.1, 0.25, 0.17, 0.05, 0.12), strict=True))
SHARES = (0.02, 0.33, 0.4, 0.08, 0.07, 0.38, 0.06)
EXTRA = {mode: {1: 3 * more, 16: more} for mode, more in zip(MODES[1:], SHARES, strict=True)}


def needed(candidate: Candidate) -> float:
    """Weights and images, what blocks keep of a micro-batch, and what a recomputed one has while it runs."""
    own, others = candidate.blocks, candidate.total - candidate.blocks
    if not candidate.blocks:
        others = BLOCKS
    kept = 10 * candidate.micro_batch * (others + own * KEPT[candidate.mode])
    return 400 + kept + (8 * candidate.micro_batch if candidate.mode.recomputes and own else 0)


def room(available: float, calls: list | None = None) -> Room:
    def noted(candidate: Candidate) -> float:
        if calls is not None:
            calls.append(candidate)
        return needed(candidate)

    return Room(noted, available, micro_batches(BATCH), BLOCKS)


def costs(small: float) -> Costs:
    """small: what a micro-batch costs beyond its images, as a share of one of them."""
    return Costs({n: n + small for n in (1, 2, 4, 8, 16, 32, 64)}, [1 / BLOCKS] * BLOCKS, EXTRA)


def best(available: float, known: Costs, exact: bool) -> float:
    """The fewest seconds of all candidates that fit, tried one by one."""
    modes = [mode for mode in MODES if mode.fidelity == EXACT or not exact]
    every = (
        Candidate(size, mode, blocks, BLOCKS)
        for size, mode, blocks in itertools.product(micro_batches(BATCH), modes, range(BLOCKS + 1))
    )
    return min((known.step(one, BATCH) for one in every if needed(one) <= available), default=math.inf)


@pytest.mark.parametrize("small", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("available", [410, 440, 470, 600, 1000, 2000, 5000, 9000])
def test_no_candidate_that_fits_is_faster(small, available):
    calls: list[Candidate] = []
    found, slower = plans(room(available, calls), costs(small), BATCH, MODES)
    assert all(plan.needed == needed(plan.candidate) <= available for plan in found)
    fastest = min((plan.seconds for plan in found), default=math.inf)
    assert fastest == pytest.approx(best(available, costs(small), exact=False))
    exact = min((plan.seconds for plan in found if plan.candidate.fidelity == EXACT), default=math.inf)
    assert exact == pytest.approx(best(available, costs(small), exact=True))
    assert all(plan.seconds >= fastest for plan in slower)
    assert len(calls) <= 60 and len(calls) == len(set(calls)), "each prediction takes a fraction of a second"


def test_codes_are_left_alone_where_an_exact_plan_is_as_fast():
    found, slower = plans(room(1000), costs(0.01), BATCH, MODES)
    assert all(plan.candidate.fidelity == EXACT for plan in found)
    assert {plan.candidate.mode for plan in slower} >= {mode for mode in MODES if mode.fidelity < EXACT}


def test_weights_in_fewer_bits_are_worth_what_they_take():
    def with_weights(candidate: Candidate) -> float:
        return needed(candidate) - (300 if candidate.weights == "int8" else 0)

    known = costs(20.0)
    known.weights["int8"] = 0.1
    space = Room(with_weights, 450, micro_batches(BATCH), BLOCKS)
    found, _ = plans(space, known, BATCH, MODES, ("fp32", "int8"))
    assert found[0].candidate.weights == "int8" and found[0].candidate.fidelity < EXACT
    assert any(plan.candidate.weights == "fp32" for plan in found)


@pytest.mark.parametrize("small", [0.01, 20.0])
@pytest.mark.parametrize("available", [130, 300, 600, 1000, 2000])
def test_weights_are_estimated_by_each_other(available, small):
    """Each way to store them takes a fixed number of bytes: then estimates find what predictions would."""
    stored = {"fp32": 0, "offload": -390, "bf16": -150, "int8": -300}
    calls = []

    def with_weights(candidate: Candidate) -> float:
        calls.append(candidate)
        return needed(candidate) + stored[candidate.weights or "fp32"]

    known = costs(small)
    known.weights |= {"offload": 0.5, "bf16": 0.3, "int8": 0.2}
    exactly = plans(Room(with_weights, available, micro_batches(BATCH), BLOCKS), known, BATCH, MODES, tuple(stored))[0]
    without, calls[:] = len(calls), []
    estimated = Room(with_weights, available, micro_batches(BATCH), BLOCKS, "fp32", 0.1)
    found = plans(estimated, known, BATCH, MODES, tuple(stored))[0]
    assert found[0].seconds == pytest.approx(exactly[0].seconds)
    assert all(plan.needed == with_weights(plan.candidate) <= available for plan in found)
    assert len(calls) < without


def test_an_estimate_is_not_taken_for_a_prediction():
    """Beyond one image memory jumps, which no line shows: what is taken was predicted, what is near is."""
    jump = Room(lambda one: 10.0 * one.micro_batch + (30 if 1 < one.micro_batch < 64 else 0), 60, [1, 2, 4, 64], 1)
    jump.doubt = 0.1
    found, _ = plans(jump, costs(0.5), 64, [PLAIN])
    assert all(plan.needed <= 60 for plan in found) and {plan.candidate.micro_batch for plan in found} == {1, 2}


def test_stock_sizes_are_taken_where_they_fit_themselves():
    odd = Room(lambda one: 100.0 if one.micro_batch == 2 else float(one.micro_batch), 8, [1, 2, 4], 1)
    found, _ = plans(odd, costs(0.01), 4, [PLAIN])
    assert {plan.candidate.micro_batch for plan in found} == {1, 4}
    faster = Costs({1: 1.0, 2: 2.0, 4: 4.0}, [1.0], {MODES[1]: {1: -0.5}})
    found, _ = plans(odd, faster, 4, [MODES[1]])
    assert {plan.candidate.micro_batch for plan in found} <= {1, 4} and found


@pytest.mark.parametrize("values", [range(13), [1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 64], [5], [1, 64]])
@pytest.mark.parametrize("limit", [-1, 0, 3, 7, 20, 63, 64, 100])
def test_how_many_is_exact_and_short(values, limit):
    there = sum(value <= limit for value in values)
    for guess in range(-1, len(values) + 1):
        calls = []

        def needed(value, calls=calls):
            calls.append(value)
            return value

        assert how_many(needed, values, limit, guess) == there
        assert len(calls) <= (2 if guess == there - 1 else 2 + 2 * len(values).bit_length())


def test_micro_batches_cut_evenly():
    assert micro_batches(64) == [1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 64]
    assert micro_batches(1) == [1] and micro_batches(5) == [1, 2, 3, 5]
    for batch in range(1, 200):
        for size in micro_batches(batch):
            count = -(-batch // size)
            assert size == -(-batch // count), "no smaller size takes as many"


def test_seconds_are_those_measured_and_between_them_in_between():
    known = Costs({1: 2.0, 4: 4.0, 16: 20.0}, [0.75, 0.25], {RECOMPUTED: {4: 0.4, 16: 0.2}}, {"int8": 0.5})
    assert [known.micro_batch(Candidate(n), n) for n in (1, 4, 16)] == pytest.approx([2.0, 4.0, 20.0])
    assert known.micro_batch(Candidate(2), 2) == pytest.approx(2 * 1.5)  # 2 s, then 1 s an image
    assert known.micro_batch(Candidate(64), 64) == pytest.approx(64 * 1.25), "flat beyond what was measured"
    assert known.step(Candidate(4), 10) == pytest.approx(2 * 4.0 + 2 * 1.5)
    assert known.step(Candidate(4, RECOMPUTED, 1, 2), 8) == pytest.approx(8.0 * (1 + 0.4 * 0.75))
    assert known.more(RECOMPUTED, 8) == pytest.approx(0.3) and known.more(RECOMPUTED, 1) == 0.4
    assert known.step(Candidate(4, PLAIN, weights="int8"), 8) == pytest.approx(8.0 + 2 * 0.5)


def test_assumed_costs_prefer_what_is_exact_and_whole():
    known = assumed(BLOCKS)
    order = [Candidate(64), Candidate(32), Candidate(1), Candidate(1, RECOMPUTED, BLOCKS, BLOCKS)]
    seconds = [known.step(candidate, BATCH) for candidate in order]
    assert seconds == sorted(seconds)
    assert isinstance(plans(room(10_000), known, BATCH, MODES)[0][0], Found)


class Clock:
    """A device whose times are known, and whose clock runs by them."""

    def __init__(self, seconds, monkeypatch, blocks=4):
        self.seconds, self.now, self.calls = seconds, 0.0, []
        self.attached = SimpleNamespace(blocks=[None] * blocks)
        monkeypatch.setattr("s2a_cli.planner.measure.time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, candidate: Candidate, images: int) -> float:
        took = self.seconds(candidate, images)
        self.now += took
        self.calls.append((candidate, images))
        return took

    def shares(self, images: int) -> list[float]:
        return [1 / 4] * 4


def test_a_slow_device_is_measured_in_time(monkeypatch):
    clock = Clock(lambda candidate, images: images * (1.3 if candidate.blocks else 1.0), monkeypatch)
    found = measure_passes(clock, [1, 2, 4, 8, 16, 32, 64], MODES[:4], lambda candidate: True)
    assert set(found.stock) == {1, 2} and all(set(sizes) == {1} for sizes in found.extra.values())
    assert clock.now < 2 * SECONDS
    assert found.more(RECOMPUTED, 2) == pytest.approx(0.3)


def test_a_short_run_is_not_measured_for_longer_than_a_part_of_it(monkeypatch):
    clock = Clock(lambda candidate, images: images * (0.013 if candidate.blocks else 0.01), monkeypatch)
    measure_passes(clock, [1, 2, 4, 8, 16, 32, 64], MODES[:4], lambda candidate: True, run=4000)
    assert clock.now == pytest.approx(SHORT_RUN * 4000 * 0.01, rel=0.3)


def test_in_the_shortest_run_too_a_fast_device_is_measured_at_more_than_the_smallest_sizes(monkeypatch):
    clock = Clock(lambda candidate, images: 0.010 + 0.001 * images, monkeypatch)
    found = measure_passes(clock, [1, 2, 4, 8, 16, 32, 64], MODES[:4], lambda candidate: True, run=16)
    assert {1, 2, 4, 8, 16, 32, 64} == set(found.stock) and clock.now < 1.5


def test_predictions_take_no_time_from_measurements(monkeypatch):
    clock = Clock(lambda candidate, images: images * (0.13 if candidate.blocks else 0.1), monkeypatch)

    def fits(candidate: Candidate) -> bool:
        clock.now += 5.0
        return True

    found = measure_passes(clock, [1, 2, 4, 8, 16, 32, 64], MODES[:4], fits)
    assert set(found.stock) >= {1, 2, 4, 8, 16} and set(found.extra) == set(MODES[1:4])


def test_a_fast_device_is_measured_at_all_sizes_that_fit(monkeypatch):
    def seconds(candidate, images):
        """The host takes 20 ms a pass, and half as much again to recompute; an image takes 1 ms."""
        return max(0.020 * (1.5 if candidate.blocks else 1.0), 0.001 * images * (1.3 if candidate.blocks else 1.0))

    clock = Clock(seconds, monkeypatch)
    found = measure_passes(clock, [1, 2, 4, 8, 16, 32, 64], MODES[:4], lambda c: bool(c.blocks) or c.micro_batch <= 32)
    assert set(found.stock) == {1, 2, 4, 8, 16, 32}
    assert found.more(RECOMPUTED, 4) == pytest.approx(0.5) and found.more(RECOMPUTED, 32) == pytest.approx(0.3)
    assert found.more(RECOMPUTED, 64) == pytest.approx(0.3), "beyond what fits in stock PyTorch its time goes on"
    assert clock.now < SECONDS


def test_what_stock_pytorch_can_not_run_is_measured_by_a_mode(monkeypatch):
    clock = Clock(lambda candidate, images: images * 0.1, monkeypatch)
    found = measure_passes(clock, [1, 2, 4], MODES[:4], lambda candidate: bool(candidate.blocks))
    assert set(found.stock) == {1} and found.stock[1] < 0.1
    assert all(candidate.blocks for candidate, _ in clock.calls)


def contenders(*steps: tuple[Candidate, float]) -> list[plan.Contender]:
    return [plan.Contender(Found(candidate, needed(candidate), seconds)) for candidate, seconds in steps]


@pytest.mark.parametrize(("step", "turns"), [(1.0, plan.TURNS), (60.0, 0)])
def test_a_device_that_can_not_time_finalists_twice_does_not_time_them(step, turns, monkeypatch):
    """Of some 60 s for 64 images a single turn of each is all that there is time for: it would be noise."""
    finalists = contenders((Candidate(4), 0.9 * step), (Candidate(8), step))
    clock = Clock(lambda candidate, images: step * images / BATCH, monkeypatch)
    monkeypatch.setattr("s2a_cli.planner.plan.time", SimpleNamespace(monotonic=lambda: clock.now))
    plan._time(finalists, cast(dict[str | None, Timer], {None: clock}), BATCH, plan.FINAL_SECONDS)
    assert len(clock.calls) >= 2 * turns and bool(clock.calls) == bool(turns)
    assert [one.step_seconds for one in finalists] == pytest.approx([step, step] if turns else [0.9 * step, step])


def test_a_single_turn_of_each_finalist_tells_nothing(monkeypatch):
    """Others on the device make each micro-batch take ten times as long as it computes."""
    finalists = contenders((Candidate(4), 9.0), (Candidate(8), 10.0))
    clock = Clock(lambda candidate, images: images / 8, monkeypatch)
    monkeypatch.setattr("s2a_cli.planner.plan.time", SimpleNamespace(monotonic=lambda: 10 * clock.now))
    plan._time(finalists, cast(dict[str | None, Timer], {None: clock}), BATCH, plan.FINAL_SECONDS)
    assert clock.calls and [one.seconds for one in finalists] == [None, None]


def test_of_plans_as_fast_stock_pytorch_is_taken_and_then_the_smallest():
    within = 1 + plan.TIE / 2
    small, large = contenders((Candidate(4), 10.0 * within), (Candidate(8), 10.0))
    assert plan._best([large, small]) is small
    plan._explain(small, [large, small])
    assert small.why == "as fast as any, within 1%, as predicted" and large.why == "1.00 times the seconds, predicted"
    saving, stock = contenders((Candidate(2, MODES[1], BLOCKS, BLOCKS), 10.0), (Candidate(8), 10.0 * within))
    assert saving.found.needed < stock.found.needed and plan._best([saving, stock]) is stock
    slower, faster = contenders((Candidate(4), 10.2), (Candidate(8), 10.0))
    assert plan._best([slower, faster]) is faster
    coded = Candidate(4, MODES[4], BLOCKS, BLOCKS)
    exact, rounded = contenders((Candidate(8), 10.0 * within), (coded, 10.0))
    assert rounded.found.needed < exact.found.needed and plan._best([exact, rounded]) is exact
