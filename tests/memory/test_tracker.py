"""The live-storage tracker on hand-made examples with known byte counts, on real and on dataless tensors."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli.common.dataless import Dataless
from s2a_cli.memory import Tracker, saved_bytes

KIB = 1024


@pytest.fixture(params=["real", "dataless"], autouse=True)
def tensors(request):
    with Dataless() if request.param == "dataless" else nullcontext():
        yield request.param


def kib(n: int) -> torch.Tensor:
    return torch.ones(n * KIB // 4)


def test_rounds_each_storage_up_to_512_bytes_and_forgets_it_when_freed():
    with Tracker() as tracker:
        a, b = torch.ones(1), torch.ones(129)
        assert tracker.live == 512 + 1024
        empty = torch.ones(0)
        assert tracker.live == 512 + 1024
        del a, empty
        assert tracker.live == 1024
        del b
        assert tracker.live == 0 and tracker.peak == 512 + 1024


def test_views_and_in_place_operators_cost_nothing():
    with Tracker() as tracker:
        a = kib(4)
        views = [a.view(2, -1), a[3:9], a.t(), a.detach(), a.expand(7, -1), a.as_strided((2,), (1,)), *a.chunk(4)]
        a.add_(1).mul_(2)[5:].zero_()
        torch.add(a, 1, out=a)
        assert tracker.live == tracker.peak == 4 * KIB
        assert len(views) == 10


def test_a_small_view_keeps_its_whole_base():
    with Tracker() as tracker:
        token = kib(64).view(16, -1)[0]
        assert tracker.live == 64 * KIB
        token = token.clone()
        assert tracker.live == 4 * KIB
        del token
        assert tracker.live == 0


def test_registered_tensors_count_once_and_until_they_die():
    weight = kib(8)
    with Tracker() as tracker:
        tracker.add([weight, weight.view(2, -1)])
        assert tracker.live == 8 * KIB
        weight.add_(1)
        assert tracker.live == 8 * KIB
        del weight
        assert tracker.live == 0


def test_a_resized_storage_counts_with_its_new_size():
    with Tracker() as tracker:
        a = kib(4)
        a.resize_(16 * KIB // 4)
        assert tracker.live == 16 * KIB
        del a
        assert tracker.live == 0


def test_the_peak_is_the_highest_sum_and_can_be_reset():
    with Tracker() as tracker:
        a = kib(4)
        b = a + 1  # 8 alive
        c = b * 2  # 12
        del a, b
        d = c + 1  # 8
        assert (tracker.live, tracker.peak) == (8 * KIB, 12 * KIB)
        tracker.reset()
        assert tracker.peak == 8 * KIB
        del c, d
        assert (tracker.live, tracker.peak) == (0, 8 * KIB)


def test_what_autograd_saves_lives_until_the_backward_pass():
    x = kib(4).requires_grad_()
    with Tracker() as tracker:
        tracker.add([x])
        y = (x + 1).exp().sin()  # exp keeps its result, sin its input: the same tensor; x + 1 dies
        assert tracker.live == 4 * KIB + 4 * KIB + 4 * KIB
        loss = y.sum()
        del y
        assert tracker.live == 4 * KIB + 4 * KIB + 512
        loss.backward()
        assert tracker.live == 4 * KIB + 4 * KIB + 512  # saved tensors gone, x.grad is there
        x.grad = None
        assert tracker.live == 4 * KIB + 512


def test_several_results_of_one_operator_count_each():
    with Tracker() as tracker:
        values, indices = kib(4).topk(256)
        assert tracker.live == 256 * (4 + 8)
        del values
        assert tracker.live == 256 * 8
        del indices


def test_reading_a_value_works_on_hollow_tensors(tensors):
    with Tracker():
        flag, whole, real = torch.ones(1) > 0, torch.ones(1, dtype=torch.long), torch.ones(1)
        assert bool(flag) is True and int(whole) == 1 and float(real) == 1.0
        if tensors == "dataless":  # one, whatever it would be
            assert float(torch.zeros(1)) == 1.0


def test_saved_bytes_counts_each_storage_once_and_whole_without_parameters():
    layer = nn.Linear(256, 256)
    x = torch.ones(4, 256)
    assert saved_bytes(lambda: layer(x), layer) == 4 * KIB  # the input, for the weight's gradient
    assert saved_bytes(lambda: layer(x) + layer(x.view(2, 2, 256)).view(4, 256), layer) == 4 * KIB
    assert saved_bytes(lambda: layer(x[:1]), layer) == 4 * KIB  # the view pins all of x
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), layer) == 0
    assert saved_bytes(lambda: F.gelu(layer(x)), layer) == 4 * KIB  # the bias has a gradient, so GELU keeps its input
    with torch.no_grad():
        assert saved_bytes(lambda: F.gelu(layer(x)), layer) == 0
