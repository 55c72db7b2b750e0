"""Passes that are replayed as CUDA graphs: on a CPU with a stand-in that runs the captured pass again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli import backbones
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.config.compose import compose
from s2a_cli.methods import STRUCTURES
from s2a_cli.training import compiling, cuda_graphs
from s2a_cli.training.cuda_graphs import PassGraphs
from s2a_cli.training.run import attach, no_graphs
from s2a_cli.training.step import Step, make_optimizer, train_mode

MODEL = ["backbone=vit_micro", "backbone.checkpoint=null", "backbone.pretrained=false", "backbone.kwargs.depth=2"]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS, BATCH = 22, 5  # more than the 17 passes in which codes are fitted


class StandIn:
    """Captures nothing: a replay runs the pass, with the tensors that a graph would read. Counts both."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
        self.captures += 1
        loss = torch.zeros(())

        def replay() -> None:
            self.replays += 1
            loss.copy_(run())

        return loss, replay, pool


def made(words: list[str], device: torch.device = CPU) -> tuple[Any, Step]:
    config = compose([*MODEL, *words])
    torch.manual_seed(0)
    attached = attach(config, backbones.build(config.backbone, 3))
    attached.model.to(device)
    train_mode(attached.model)
    return attached, Step(config, device, attached)


def trained(
    words: list[str], graphs: PassGraphs | None, device: torch.device = CPU
) -> tuple[list[Tensor], list[float]]:
    """What trains after some steps, of which every fourth is a smaller batch, and the losses."""
    attached, step = made(words, device)
    step.graphs, losses = graphs, []
    optimizer = make_optimizer(step.optim, attached.model, attached)
    size, generator = attached.backbone.image.size, torch.Generator().manual_seed(0)
    for number in range(STEPS):
        count = BATCH - 2 if number % 4 == 3 else BATCH
        images, targets = torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 3
        torch.manual_seed(number)
        losses.append(step(attached.model, optimizer, images.to(device), targets.to(device)).item())
    return [p.detach().cpu() for p in attached.model.parameters() if p.requires_grad], losses


COMPOSITIONS = [
    ["method=bias", "quant=none"],
    ["method=s2a", "quant=int4"],
    ["method=s2a", "quant=tiny", "optim.micro_batch=2"],
    ["method=side", "quant=none", "optim.clip_grad=0.1"],
    ["method=full", "quant=exact", "optim.micro_batch=3", "optim.name=sgd"],
    ["method=vpt_deep", "quant=none"],  # with dropout
]


@pytest.mark.parametrize("words", COMPOSITIONS, ids=" ".join)
def test_replayed_steps_train_what_others_do(words):
    stand_in = StandIn()
    expected, losses = trained(words, None)
    found, replayed = trained(words, PassGraphs(stand_in))
    assert stand_in.captures >= 2 and stand_in.replays > stand_in.captures
    assert replayed == losses
    assert all(map(torch.equal, found, expected))


class FakeGraph:
    """Takes the place of torch.cuda.CUDAGraph, and of the context that captures into it."""

    error: Exception | None = None
    entered: list[dict[str, Any]] = []

    def replay(self) -> None:
        pass

    def pool(self) -> str:
        return "pool"

    def __call__(self, graph: FakeGraph, **given: Any) -> FakeGraph:
        self.entered.append(given)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        if error[0] and self.error:
            raise self.error


@pytest.fixture
def fake_graph(monkeypatch):
    context = FakeGraph()
    context.entered = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", context)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "own")
    return context


def test_a_capture_is_made_on_the_own_stream_and_shares_a_pool(fake_graph, monkeypatch):
    result, replay, pool = cuda_graphs.capture(lambda: torch.ones(()), "shared")
    assert (result.item(), pool) == (1.0, "pool") and callable(replay)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "default")  # which can't be captured
    cuda_graphs.capture(lambda: torch.ones(()), None)
    own = {"pool": "shared", "stream": "own", "capture_error_mode": "thread_local"}
    assert fake_graph.entered == [own, own | {"pool": None, "stream": None}]


def test_a_capture_that_fails_says_why(fake_graph):
    fake_graph.error = RuntimeError("the capture was invalidated")

    def runs_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        cuda_graphs.capture(runs_out, None)
    with pytest.raises(RunError, match="operation not permitted.*set cuda_graphs=false"):
        cuda_graphs.capture(waits, None)


def test_memory_comes_back_before_a_pass_that_is_not_captured():
    """Else the memory of two passes would be taken at once."""
    attached, step = made(["method=bias", "quant=none"])
    step.graphs = PassGraphs(stand_in := StandIn())
    optimizer, size = make_optimizer(step.optim, attached.model), attached.backbone.image.size
    active = []
    for count in (4, 4, 4, 4, 4, 4, 3, 4, 3, 4):
        step(attached.model, optimizer, torch.randn(count, 3, size, size), torch.arange(count) % 3)
        active.append((step.graphs.is_active, stand_in.captures))
    assert active == [*[(False, 0)] * 5, (True, 1), (False, 1), (True, 2), (True, 3), (True, 3)]
    step.release()
    assert not step.graphs.is_active


def test_nothing_is_captured_before_codes_are_fitted():
    attached, step = made(["method=bias", "quant=int4"])
    step.graphs = PassGraphs(stand_in := StandIn())
    optimizer, size = make_optimizer(step.optim, attached.model), attached.backbone.image.size
    at = []
    for _ in range(20):
        step(attached.model, optimizer, torch.randn(2, 3, size, size), torch.arange(2))
        at.append(stand_in.captures)
    assert at == [0] * 17 + [1] * 3  # a layer is looked at in its first pass and in the 16th after it at last


def test_a_parameter_without_a_gradient_keeps_none():
    """A gradient of zeros would let weight decay change it."""
    attached, step = made(["method=bias", "quant=none"])
    idle = torch.nn.Parameter(torch.ones(2, 2))
    attached.model.register_parameter("idle_weight", idle)
    step.graphs = PassGraphs(StandIn())
    optimizer, size = make_optimizer(step.optim, attached.model), attached.backbone.image.size
    for _ in range(8):
        step(attached.model, optimizer, torch.randn(2, 3, size, size), torch.arange(2))
    assert idle.grad is None and torch.equal(idle, torch.ones(2, 2))
    assert attached.model.get_parameter("idle_weight") is idle


class Uncapturable(TorchDispatchMode):
    """Collects operators that wait for the device, or that bring numbers of the host to it."""

    NAMES = (*compiling.Watched.WAITS, "lift_fresh", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [x for x in args[1] or () if x is not None] if name in ("index", "index_put_") else []
        if name in self.NAMES or any(x.dtype == torch.bool for x in masks):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quant", ["none", "exact", "int4", "int5", "int8", "paper", "tiny"])
@pytest.mark.parametrize("method", ["full", "bias", "prompt", "side", "s2a", "lora", "ssf", "s2a_paper"])
def test_a_settled_pass_needs_nothing_of_the_host(method, quant):
    attached, step = made([f"method={method}", f"quant={quant}"])
    size = attached.backbone.image.size
    batch = torch.randn(2, 3, size, size), torch.arange(2)
    for _ in range(18):
        step.accumulate(attached.model, *batch)
    with Uncapturable() as watched:
        step.accumulate(attached.model, *batch)
    assert not watched.found


@pytest.mark.parametrize("method", STRUCTURES)
def test_every_structure_needs_nothing_of_the_host_or_is_refused(method):
    config = compose([*MODEL, f"method={method}", "quant=none", "optim.batch_size=2"])
    try:
        attached = attach(config, backbones.build(config.backbone, 3))
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])
    if no_graphs(config, attached, CUDA):
        return
    step, size = Step(config, CPU, attached), attached.backbone.image.size
    train_mode(attached.model)
    batch = torch.randn(2, 3, size, size), torch.arange(2)
    step.accumulate(attached.model, *batch)
    with Uncapturable() as watched:
        step.accumulate(attached.model, *batch)
    assert not watched.found


def test_an_operator_that_waits_is_seen():
    with Uncapturable() as watched:
        torch.tensor([1.0]).item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert watched.found >= {"lift_fresh", "_local_scalar_dense", "index"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=boft"], "_linalg_check_errors"),
        (["method=head2toe"], "changes what it computes"),
        (["method=bias", "quant=int4", "quant.rounding=stochastic"], "quant.rounding=nearest"),
        (["method=vpt_deep", "quant=tiny"], "without random numbers"),
        (["method=vpt_deep", "quant.blocks={1: {recompute: block}}"], "without random numbers"),
        (["method=bias", "backbone.weights=offload"], "weights on the device"),
    ],
)
def test_what_can_not_be_captured_is_refused(words, said):
    config = compose([*MODEL, *words])
    attached = attach(config, backbones.build(config.backbone, 3, meta=True))
    assert said in (no_graphs(config, attached, CUDA) or "")
    assert "not cpu" in (no_graphs(config, attached, CPU) or "")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda x: float(x.mean()), "_local_scalar_dense"),
        (lambda x: len(x.unique()), "a forward pass that reads no values"),
    ],
    ids=["a number", "a shape"],
)
def test_a_model_that_reads_values_is_refused(read, said):
    config = compose([*MODEL, "method=bias"])
    attached = attach(config, backbones.build(config.backbone, 3))
    attached.model.register_forward_hook(lambda module, args, output: output * read(output))
    assert said in (no_graphs(config, attached, CUDA) or "")


def test_several_processes_are_refused():
    config = compose([*MODEL, "method=vpt_deep"])
    attached = attach(config, backbones.build(config.backbone, 3, meta=True))
    assert no_graphs(config, attached, CUDA) is None
    assert "one process" in (no_graphs(config, attached, CUDA, processes=2) or "")


def test_a_cpu_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    from s2a_cli.training import run

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cuda_graphs=true needs a CUDA device, not cpu"):
        run.prepare(compose([*MODEL, "method=bias", "dataset=digits", "device=cpu", "cuda_graphs=true"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", COMPOSITIONS, ids=" ".join)
def test_on_cuda(words):
    expected, losses = trained(words, None, CUDA)
    found, replayed = trained(words, PassGraphs(), CUDA)
    assert replayed == pytest.approx(losses, abs=1e-4)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
