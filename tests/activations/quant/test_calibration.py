"""Codebook entries and channels fitted to a layer's own inputs: when, from what, and how they live on."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s2a_cli.activations import compress_activations
from s2a_cli.activations.quant import codebooks
from s2a_cli.activations.quant.calibration import LOOKS, PATIENCE
from s2a_cli.config.schema import QuantConfig


def config(**settings) -> QuantConfig:
    return QuantConfig(name="test", **settings)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.second(F.gelu(self.first(self.norm(x))))


def batch(seed: int, samples: int = 8) -> torch.Tensor:
    x = torch.randn(samples, 5, 16, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 3, 16) + torch.linspace(-2, 2, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Block(), Block())


def gradient(model, memory, x) -> torch.Tensor:
    model.zero_grad()
    with memory:
        out = model(x)
    out.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


FAMILIES = {"pointwise": 4, "norm": 4, "linear": 4}


def fitted(memory) -> dict[str, torch.Tensor]:
    return memory.calibration.fitted()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tensors_are_where_the_model_is_whatever_the_default_device(rounding, model):
    """As under torch.set_default_device("cuda"); on meta, a tensor that is made without a device has no values."""
    settings, x = config(**FAMILIES, attention=4, rounding=rounding), batch(1)
    torch.manual_seed(0)
    expected = gradient(model, compress_activations(settings), x)
    codebooks._made.cache_clear()
    codebooks._on.cache_clear()
    torch.manual_seed(0)
    with torch.device("meta"):
        found = gradient(model, compress_activations(settings), x)
    assert torch.equal(found, expected)


def test_a_layer_is_looked_at_in_a_few_forward_passes(model):
    memory = compress_activations(config(**FAMILIES))
    states = []
    for number in range(LOOKS[-1] + 3):
        gradient(model, memory, batch(number))
        states.append(fitted(memory))
    assert len(states[0]) == 9 and all(state.keys() == states[0].keys() for state in states)
    changed = [
        i
        for i in range(1, len(states))
        if any(not torch.equal(states[i][key], states[i - 1][key]) for key in states[0])
    ]
    assert changed == list(LOOKS[1:])
    again = compress_activations(config(**FAMILIES))
    gradient(model, again, batch(0))
    assert all(torch.equal(states[0][key], fitted(again)[key]) for key in states[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_resumed_run_goes_on_as_it_was(model, rounding):
    settings = config(**FAMILIES, rounding=rounding)
    memory, resumed = compress_activations(settings), compress_activations(settings)
    gradient(model, memory, batch(0))
    resumed.calibration.load_state_dict(memory.calibration.state_dict())
    for seed in range(1, LOOKS[-1] + 2):
        assert torch.equal(gradient(model, memory, batch(seed)), gradient(model, resumed, batch(seed)))


def test_names_in_a_saved_state_stay(model):
    """A run that was saved by an earlier version goes on with its own layers: these names are in its files."""
    memory = compress_activations(config(**FAMILIES, softmax=4, recompute="block", input=8), model[1:])
    gradient(model, memory, batch(0))
    state = memory.calibration.state_dict()
    assert state.keys() == {"layers", "draws", "passes"}
    own = {"1:input/channels/16", "1:gelu/gelu/4", "1.norm:layer_norm/channels/16", "1.first:linear/channels/16"}
    assert own <= state["layers"].keys()
    assert all(layer.keys() == {"first", "last", "looks", "seen", "fitted"} for layer in state["layers"].values())


def test_without_calibration_there_is_no_state(model):
    memory = compress_activations(config(**FAMILIES, calibrate=False))
    gradient(model, memory, batch(0))
    assert not fitted(memory) and not memory.calibration.state_dict()["layers"]


def test_pieces_and_recomputation_calibrate_the_same_sites(model):
    plain = compress_activations(config(**FAMILIES), model[1:])
    gradient(model, plain, batch(0))
    chunked = compress_activations(config(**FAMILIES, chunks=4), model[1:])
    gradient(model, chunked, batch(0))
    first = compress_activations(config(**FAMILIES), model[1:])
    gradient(model, first, batch(0)[:2])  # the first of four pieces
    found, expected = fitted(chunked), fitted(first)
    assert found.keys() == expected.keys() == fitted(plain).keys()
    inside = [site for site in found if site[0] in "12"]
    assert len(inside) == 8 and all(torch.allclose(found[site], expected[site], atol=1e-3) for site in inside)

    again = compress_activations(config(**FAMILIES, recompute="block"), model[1:])
    gradient(model, again, batch(0))
    found, expected = fitted(again), fitted(plain)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[site], expected[site], atol=1e-3) for site in expected)  # not from a probe


def test_a_trace_leaves_nothing_behind(model):
    memory = compress_activations(config(**FAMILIES, softmax=4))
    with FakeTensorMode():
        x = torch.empty(2, 5, 16, requires_grad=True)
        with memory:
            F.gelu(F.layer_norm(x, (16,))).softmax(-1)
    assert not fitted(memory) and not memory.calibration.state_dict()["layers"]
    assert torch.isfinite(gradient(model, memory, batch(0))).all()


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.softplus, torch.sigmoid, torch.tanh])
def test_levels_of_the_layer_are_nearer_than_fixed_ones(function):
    x = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0)) * 0.4 + 1.5
    x.requires_grad_()
    exact = torch.autograd.grad(function(x).sum(), x)[0]
    errors = []
    for calibrate in (True, False):
        with compress_activations(config(pointwise=4, calibrate=calibrate)):
            out = function(x)
        errors.append(relative(torch.autograd.grad(out.sum(), x)[0], exact))
    assert errors[0] < 0.8 * errors[1]


def outliers() -> torch.Tensor:
    """Like a residual stream: a few channels a hundred times larger than the rest."""
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) + 0.5
    x[:, [7, 70, 150]] = 100 * x[:, [7, 70, 150]] - 40
    return x


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "linear"])
def test_outlier_channels_do_not_coarsen_the_others(name):
    x, weight = outliers().requires_grad_(), torch.ones(192, requires_grad=True)
    matrix = torch.randn(4, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run, of = {
        "layer_norm": (lambda: F.layer_norm(x, (192,), weight), weight),
        "rms_norm": (lambda: F.rms_norm(x, (192,), weight), weight),
        "linear": (lambda: F.linear(x, matrix), matrix),
    }[name]
    out = run()
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (exact,) = torch.autograd.grad(out, of, cotangent)
    usual = [channel for channel in range(192) if channel not in (7, 70, 150)]
    errors = []
    for calibrate in (True, False):
        with compress_activations(config(norm=4, linear=4, calibrate=calibrate)):
            out = run()
        (grad,) = torch.autograd.grad(out, of, cotangent)
        errors.append(relative(grad[..., usual], exact[..., usual]))
    assert errors[0] < 0.12 and errors[0] < 0.5 * errors[1]


def test_a_block_input_with_outlier_channels():
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 192))
    x = outliers()[:, None].requires_grad_()
    exact = torch.autograd.grad(block(x).square().sum(), x)[0]
    errors = []
    for calibrate in (True, False):
        with compress_activations(config(recompute="block", input=6, calibrate=calibrate), [block]):
            out = block(x)
        errors.append(relative(torch.autograd.grad(out.square().sum(), x)[0], exact))
    assert errors[0] < 0.8 * errors[1]


ODD = {
    "zeros": lambda x: torch.zeros_like(x),
    "a constant": lambda x: torch.ones_like(x),
    "one sample with NaN": lambda x: x.index_fill(0, torch.tensor(0), torch.nan),
    "one sample with a NaN": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 3, torch.nan, x),
    "one sample of 1e4": lambda x: torch.cat([x[:1] * 1e4, x[1:]]),
    "one black sample": lambda x: torch.cat([x[:1] * 0, x[1:]]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "quant",
    [config(bits=4), config(recompute="block", input=8), config(recompute="block", input=4)],
    ids=["int4", "tiny", "input4"],
)
def test_an_odd_first_batch_does_not_stay(quant, name, monkeypatch):
    """One of 1e4 made the error of `tiny` 0.27, 300 times what it is."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    scale, shift = torch.ones(16), torch.zeros(16)
    scale[:2], shift[5] = 60.0, 40.0  # residual streams have such channels

    def images() -> torch.Tensor:
        return torch.randn(32, 20, 16) * scale + shift

    first, later = images(), images()
    exact = gradient(blocks, torch.enable_grad(), later.clone().requires_grad_())
    errors = []
    for start in (first, ODD[name](first)):
        memory = compress_activations(quant, blocks if quant.recompute == "block" else ())
        gradient(blocks, memory, start.clone().requires_grad_())
        errors.append(relative(gradient(blocks, memory, later.clone().requires_grad_()), exact))
    assert errors[1] < 1.3 * errors[0]


def test_an_odd_batch_among_usual_ones_is_outvoted():
    x, memory = torch.randn(64, 4, 16), compress_activations(config(norm=4))
    channels = []
    for number in range(LOOKS[-1] + 1):
        seen = x * torch.linspace(0.1, 50, 16) if number == 0 else x
        with memory:
            F.layer_norm(seen.clone().requires_grad_(), (16,))
        channels.append(next(iter(fitted(memory).values()), None))
    fresh = compress_activations(config(norm=4))
    with fresh:
        F.layer_norm(x.clone().requires_grad_(), (16,))
    usual = next(iter(fitted(fresh).values()))
    assert (channels[0] - usual).abs().max() > 0.3 and torch.allclose(channels[-1], usual, atol=1e-5)


def test_no_one_is_warned_of_places_of_medians(recwarn, monkeypatch):
    nanmedian = torch.Tensor.nanmedian

    def as_on_cuda(x: torch.Tensor, *dim: int):
        if dim:
            warnings.warn("median CUDA with indices output does not have a deterministic implementation", stacklevel=1)
        return nanmedian(x, *dim)

    monkeypatch.setattr(torch.Tensor, "nanmedian", as_on_cuda)
    memory = compress_activations(config(norm=4))
    with memory:
        F.layer_norm(torch.randn(8, 4, 16, requires_grad=True), (16,))
    assert fitted(memory) and not recwarn


def test_a_layer_that_tells_nothing_is_given_up():
    memory = compress_activations(config(norm=4))
    for _ in range(PATIENCE + 1):
        with memory:
            F.layer_norm(torch.zeros(4, 16, requires_grad=True), (16,))
    assert not fitted(memory) and not any(layer.due(PATIENCE + 2) for layer in memory.calibration._layers.values())


def test_constant_and_diverged_first_batches_are_no_error():
    for value in (0.0, 1e30, float("nan")):
        x = torch.full((4, 5, 16), value, requires_grad=True)
        memory = compress_activations(config(**FAMILIES, softmax=4))
        with memory:
            F.gelu(F.layer_norm(x, (16,))).softmax(-1)
        with memory:
            later = batch(0).requires_grad_()
            out = F.gelu(F.layer_norm(later, (16,))).softmax(-1)
        assert torch.autograd.grad(out.square().sum(), later)[0].isfinite().all()


def test_a_strided_input_is_sampled_all_over():
    x = torch.randn(6, 40, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = []
    for seen in (x, x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()):
        memory = compress_activations(config(pointwise=3))
        with memory:
            F.gelu(seen)
        states.extend(fitted(memory).values())
    assert torch.equal(*states)
