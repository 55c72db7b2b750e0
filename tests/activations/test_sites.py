"""Names of calls: the same whatever trains, so that a table serves the function that it was made for."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli.activations import compress_activations
from s2a_cli.config.schema import QuantConfig

CODED = QuantConfig(bits=4)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class Two(nn.Module):
    """A GELU and a sigmoid behind layers that can be frozen apart."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.last(torch.sigmoid(self.second(F.gelu(self.first(x) * 2))))


def gradient(run, parameters, memory=None) -> torch.Tensor:
    parameters = list(parameters)
    with memory or torch.enable_grad():
        loss = run().square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("as_module", [True, False], ids=["a module", "functions"])
def test_unfreezing_does_not_shift_names(as_module):
    torch.manual_seed(0)
    model, x = Two(), torch.randn(256, 32)
    run = (lambda: model(x)) if as_module else (lambda: Two.forward(model, x))
    exact = gradient(run, model.first.parameters())
    memory = compress_activations(CODED)
    model.first.requires_grad_(False)
    gradient(run, model.second.parameters(), memory)  # of the two functions, the sigmoid alone is coded
    model.first.requires_grad_(True)
    late = gradient(run, model.first.parameters(), memory)
    fresh = gradient(run, model.first.parameters(), compress_activations(CODED))
    assert relative(fresh, exact) < 0.03 and relative(late, exact) < 0.03


def test_another_width_or_function_at_the_same_place_is_another_layer():
    norms = nn.LayerNorm(32), nn.LayerNorm(64)
    memory = compress_activations(CODED)
    for norm, width, function in ((norms[0], 32, F.gelu), (norms[1], 64, F.silu), (norms[0], 32, F.gelu)):
        x = torch.randn(8, width, requires_grad=True)
        exact = torch.autograd.grad(function(norm(x)).square().sum(), x)[0]
        with memory:
            out = function(norm(x))
        assert relative(torch.autograd.grad(out.square().sum(), x)[0], exact) < 0.2
    assert len(memory.calibration.fitted()) == 4


def test_names_are_those_of_modules():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    memories = [
        compress_activations(CODED),
        compress_activations(CODED, model.blocks),
        compress_activations(QuantConfig(bits=4, recompute="block"), model.blocks),
    ]
    names = []
    for memory in memories:
        with memory:
            loss = model(torch.randn(2, 3, 32, 32)).sum()
        loss.backward()
        names.append({key for key in memory.calibration.fitted() if not key.split("/")[0].endswith(":input")})
    assert names[0] == names[1] == names[2]
    assert (
        "blocks.1.mlp.act:gelu/gelu approximate=none/4" in names[0]
        and "blocks.0.norm1:layer_norm/channels/192" in names[0]
    )


@pytest.mark.parametrize(
    "config",
    [QuantConfig(recompute="block"), QuantConfig(recompute="block", input=8, chunks=8), CODED],
    ids=["exact", "tiny", "int4"],
)
def test_what_is_unfrozen_later_gets_its_gradient(config):
    """Gradual unfreezing, also of parameters that live outside of the block."""
    torch.manual_seed(0)
    outside = nn.Parameter(torch.randn(32))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(self.norm(x)))) * (1 + outside)

    blocks = nn.Sequential(Block(), Block())
    everything = [*blocks.parameters(), outside]
    memory, x = compress_activations(config, blocks), torch.randn(8, 32)
    for trained in ([blocks[0].a.bias], [blocks[1].a.bias], everything, [outside], everything, [blocks[0].norm.weight]):
        for p in everything:
            p.requires_grad_(any(p is t for t in trained))
        exact = gradient(lambda: blocks(x), trained)
        assert relative(gradient(lambda: blocks(x), trained, memory), exact) < 0.1, len(trained)


def test_what_is_compiled_around_it_leaves_no_hooks_behind():
    model, memory = Two(), compress_activations(CODED)

    def step(x):
        for _ in range(2):
            torch._dynamo.graph_break()
            with memory:
                out = model(x)
        return out

    with pytest.raises(RuntimeError, match=r"Put torch\.compiler\.disable around that function"):
        torch.compile(step, backend="eager")(torch.randn(2, 32))
    assert not torch.nn.modules.module._global_forward_pre_hooks
    with memory:
        assert torch.compile(lambda x: model(x), backend="eager")(torch.randn(2, 32)).shape == (2, 8)
