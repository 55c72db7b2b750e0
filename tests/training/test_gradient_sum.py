"""Sums of gradients over processes, in buckets: the order in which they go out, and that they are sums."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from s2a_cli.common.dataless import Dataless
from s2a_cli.training import gradient_sum
from s2a_cli.training.gradient_sum import GradientSum


class Work:
    def __init__(self, log: list, name: tuple[int, ...]):
        self.log, self.name = log, name

    def wait(self) -> None:
        self.log.append(("finished", self.name))


@pytest.fixture
def log(monkeypatch):
    """Two processes with the same gradients: each sum is twice the gradient. What went out, in order."""
    events: list = []

    def all_reduce(flat, async_op):
        flat.mul_(2)
        events.append(("started", flat.numel()))
        return Work(events, flat.numel())

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradient_sum, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(gradient_sum, "broadcast", lambda make: make())
    return events


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def exact(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [2 * g for g in torch.autograd.grad(model(x).square().sum(), list(model.parameters()))]


def backward(model: nn.Module, total: GradientSum, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with total.last_backward():
        model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("bucket", [1, 200, 2**20], ids=["one a parameter", "some", "all in one"])
def test_sums_in_every_step(log, monkeypatch, bucket):
    monkeypatch.setattr(gradient_sum, "BUCKET", bucket)
    model, x = network(), torch.randn(3, 4)
    total = GradientSum(model.parameters())
    for _ in range(3):
        for found, right in zip(backward(model, total, x), exact(model, x), strict=True):
            torch.testing.assert_close(found, right)
    started = [size for event, size in log if event == "started"]
    assert len(started) == 3 * {1: 6, 200: 4, 2**20: 1}[bucket] or bucket == 200


def test_buckets_go_out_while_the_backward_pass_goes_on(log, monkeypatch):
    monkeypatch.setattr(gradient_sum, "BUCKET", 1)
    model, x = network(), torch.randn(3, 4)
    model[0].register_full_backward_hook(lambda *_: log.append(("backward", "first layer")))
    total = GradientSum(model.parameters())
    backward(model, total, x)
    assert log.index(("backward", "first layer")) < log.index(("started", 2)), "it sees the order first"
    log.clear()
    backward(model, total, x)
    sizes = [size for event, size in log if event == "started"]
    assert log.index(("started", 2)) < log.index(("backward", "first layer")) and sizes[:2] in ([2, 32], [32, 2])
    alive = 0
    for event, _ in log:
        alive += {"started": 1, "finished": -1}.get(event, 0)
        assert alive <= gradient_sum.IN_FLIGHT
    assert alive == 0


def test_gradients_of_earlier_backward_passes_and_unused_parameters(log, monkeypatch):
    monkeypatch.setattr(gradient_sum, "BUCKET", 1)
    model, x, vote, unused = network(), torch.randn(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)
    parameters = [*model.parameters(), *vote.parameters(), *unused.parameters()]
    total = GradientSum(parameters)
    for _ in range(3):
        for p in parameters:
            p.grad = None
        vote(x).sum().backward()
        model(x).sum().backward()  # a micro-batch
        with total.last_backward():
            model(x).square().sum().backward()
        wanted = [
            2 * g for g in torch.autograd.grad(model(x).square().sum() + model(x).sum(), list(model.parameters()))
        ]
        for p, right in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, right)
        torch.testing.assert_close(vote.bias.grad, torch.full((1,), 6.0))
        assert all(p.grad is None for p in unused.parameters())


def test_a_parameter_that_gets_no_gradient_any_more_holds_nothing_up(log, monkeypatch):
    monkeypatch.setattr(gradient_sum, "BUCKET", 2**20)
    model, x = network(), torch.randn(3, 4)
    total = GradientSum(model.parameters())
    backward(model, total, x)
    model.zero_grad()
    with total.last_backward():
        model[0](x).square().sum().backward()
    (right,) = torch.autograd.grad(model[0](x).square().sum(), [model[0].bias])
    torch.testing.assert_close(model[0].bias.grad, 2 * right)
    for found, wanted in zip(backward(model, total, x), exact(model, x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_it_is_made_for_certain_parameters():
    model = network()
    total = GradientSum(model.parameters())
    assert total.fits(model.parameters())
    model[0].bias.requires_grad_(False)
    assert not total.fits(model.parameters()) and not total.fits(network().parameters())


def test_alone_nothing_is_sent(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    model, x = network(), torch.randn(3, 4)
    found = backward(model, GradientSum(model.parameters()), x)
    for a, b in zip(found, exact(model, x)):
        torch.testing.assert_close(2 * a, b)


def test_a_prediction_sends_nothing(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    monkeypatch.setattr(dist, "broadcast_object_list", None)
    monkeypatch.setattr(gradient_sum, "rank_and_world_size", lambda: (0, 2))
    model, x = network(), torch.randn(3, 4)
    total = GradientSum(model.parameters())
    with Dataless():
        for _ in range(2):
            backward(model, total, x)
