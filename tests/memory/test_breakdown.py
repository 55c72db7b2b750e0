"""Where the memory of a step is: sums to the byte, closed formulas by family, phases and places; the Python API."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s2a_cli
from s2a_cli.common.dataless import Dataless, is_dataless
from s2a_cli.config.compose import compose
from s2a_cli.memory import observe
from s2a_cli.memory.result import MIB
from s2a_cli.planner.plot import live
from s2a_cli.planner.run_memory import Composition, Predictor

WIDE, LONG = 192, 197  # ViT-tiny
BATCH = 16


def profile(*words):
    composition = Composition.of(compose(["backbone=vit_t", "dataset=cifar100", f"optim.batch_size={BATCH}", *words]))
    return Predictor()(composition)


@pytest.mark.parametrize(
    "words",
    [
        ("method=full", "quant=none"),
        ("method=bias", "quant=int4"),
        ("method=s2a", "quant=tiny"),
        ("method=side", "quant=none", "optim.micro_batch=4"),
        ("method=bias", "quant=none", "backbone=resnet18", "precision=amp-bf16"),
        ("method=linear", "quant=none", "backbone=swin_t", "backbone.weights=nf4", "optim=sgd"),
        ("method=prompt", "quant=paper", "precision=amp-fp16"),
    ],
)
def test_parts_add_up_to_the_peak_to_the_byte(words):
    found = profile(*words)
    assert found.peak_bytes == found.memory.peak_mib * MIB
    for keys in (("use",), ("family",), ("place",), ("use", "family", "place")):
        assert sum(found.by(*keys).values()) == found.peak_bytes
    total = live(found).sum(1)
    assert total.max() == pytest.approx(found.memory.peak_mib) and total.argmax() == found.peak_at - found.begins_at
    assert total[0] == pytest.approx(found.memory.static_mib)
    static = found.by("use", uses=("weights", "trainable", "optimiser", "buffers"))
    assert sum(static.values()) == pytest.approx(found.memory.static_mib * MIB)


BLOCK = {  # bytes an element of [B, N, C] and block in fp32: full fine-tuning, bias tuning
    "normalisation": (8, 8),  # the inputs of both
    "attention": (16, 16),  # q, k, v and the output
    "activation": (16, 16),  # GELU's input
    "linear": (24, 0),  # the inputs of qkv and fc1, and of fc2
}


@pytest.mark.parametrize("method, column", [("full", 0), ("bias", 1)])
def test_families_keep_what_the_formulas_say(method, column):
    found = profile(f"method={method}", "quant=none", "optim=sgd")
    kept = found.by("family", "place", uses=("kept",))
    for family, bytes in BLOCK.items():
        expected = bytes[column] * BATCH * LONG * WIDE
        assert kept.get((family, "blocks.3"), 0) == pytest.approx(expected, rel=0.03)


def test_weights_gradients_and_state_are_told_apart():
    found = profile("backbone=vit_s", "method=full", "quant=none", "optim.batch_size=1")  # the update is the peak
    uses, weights = found.by("use"), sum(p.bytes for p in found.parts if p.use == "trainable")
    assert found.phase == "update" and found.place == "loss and update"
    assert uses["gradients",] == pytest.approx(weights, rel=0.01) and uses["optimiser",] == pytest.approx(
        2 * weights, rel=0.01
    )
    assert found.by("place", uses=("gradients",))["blocks.0",] == found.by("place", uses=("trainable",))["blocks.0",]
    frozen = profile("method=linear", "quant=none", "backbone.weights=int8")
    whole = profile("method=linear", "quant=none")
    share = frozen.by("family", uses=("weights",))["linear",] / whole.by("family", uses=("weights",))["linear",]
    assert share == pytest.approx(8.25 / 32, rel=0.05)


def test_an_update_beside_the_pool_of_a_graph():
    """The pool holds what passes need: of one image less, of many more than AdamW's roots, which then come on top."""
    words = "backbone=vit_s", "method=full", "quant=none"
    one, many = (profile(*words, f"optim.batch_size={images}") for images in (1, 64))
    weights = sum(part.bytes for part in one.parts if part.use == "trainable")
    assert 0 < one.unshared_bytes < 0.5 * weights and many.unshared_bytes == pytest.approx(weights, rel=0.1)
    graphs = profile(*words, "optim.batch_size=64", "cuda_graphs=true")
    assert graphs.reserved_bytes() >= many.reserved_bytes() + 0.9 * weights


def test_recomputed_blocks_belong_to_their_place():
    found = profile("method=bias", "quant=tiny")
    assert found.phase == "backward" and found.place.startswith("blocks.")
    assert any(part.use == "transient" and part.place == found.place for part in found.parts)


def test_counting_on_real_tensors_gives_the_same_parts():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
    batch = torch.randn(32, 64), torch.arange(32) % 10

    def step(model, optimizer, x, y, after_forward):
        loss = F.cross_entropy(model(x), y)
        after_forward()
        loss.backward()
        del loss
        optimizer.step()

    real = observe(model, batch, step, lambda m: torch.optim.AdamW(m.parameters()))
    predicted = s2a_cli.predict_memory(model, batch[0], F.cross_entropy, targets=batch[1])
    assert predicted.by("use", "family", "place") == real.by("use", "family", "place")
    assert predicted.peak_bytes == real.peak_bytes


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def test_the_api_takes_any_model_shape_and_loss():
    with torch.device("meta"):
        model = Convolutions()
    found = s2a_cli.predict_memory(model, (8, 3, 64, 64), optimizer=partial(torch.optim.SGD, lr=0.1))
    assert found.memory.kind == "predicted"
    whole = 8 * 64 * 64 * 64 * 4
    assert found.by("place", uses=("kept",))["layers.1",] == whole  # ReLU keeps its output, not the convolution's
    assert s2a_cli.predict_memory(model, (16, 3, 64, 64)).peak_bytes > 1.9 * found.peak_bytes
    assert next(model.parameters()).device.type == "meta"
    half = s2a_cli.predict_memory(
        model, (8, 3, 64, 64), precision="amp-fp16", optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    assert half.memory.kept_mib < 0.7 * found.memory.kept_mib


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch": (0, 3, 8, 8)}, "at least 1"),
        ({"precision": "int3"}, "expected one of fp32, amp-bf16"),
        ({"targets": torch.zeros(8)}, "need a loss"),
    ],
)
def test_the_api_refuses(change, said):
    with pytest.raises(ValueError, match=said):
        s2a_cli.predict_memory(Convolutions(), **({"batch": (8, 3, 8, 8)} | change))
    with pytest.raises(ValueError, match="nothing to train"):
        s2a_cli.predict_memory(Convolutions().requires_grad_(False), (8, 3, 8, 8))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "vit"}, r"model: expected a torch\.nn\.Module, not 'vit'"),
        ({"batch": 8}, "batch: expected tensors, or a shape such as .* not 8"),
        ({"blocks": torch.nn.ModuleList()}, "blocks: expected {name: module}, not ModuleList"),
        ({"quant": 4}, "config: expected a QuantConfig or a name such as 'tiny', not 4"),
    ],
)
def test_the_api_refuses_what_is_of_another_type(change, said):
    with pytest.raises(s2a_cli.UserError, match=said):
        s2a_cli.predict_memory(**({"model": Convolutions(), "batch": (8, 3, 8, 8)} | change))


def test_importing_the_package_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, s2a_cli; assert 'torch' not in sys.modules"], check=True)


def test_hollow_tensors_take_no_memory():
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # pages
    with Dataless():
        before = resident()
        tensors = [torch.zeros(1 << 26).add_(1) for _ in range(4)]  # 1 GiB
        assert resident() - before < (64 << 20) // 4096 and is_dataless(tensors[0])


def test_hollow_operators_return_what_real_ones_do():
    def results():
        torch.manual_seed(0)
        x = torch.randn(4, 6, 8)
        values, indices = x.topk(3)
        out = [x.transpose(0, 1), x @ x.mT, x.softmax(-1), values, indices, x.to(torch.bfloat16)]
        out += [
            F.conv2d(x[None], torch.randn(5, 4, 3, 3)),
            torch.arange(5),
            x.view(-1)[::2].contiguous(),
            x > 0,
            *x.split(2),
        ]
        out += torch._foreach_mul([x, values], 2.0)
        assert x.add_(1) is x
        out += [x[0].t_(), torch.add(x, 1, out=torch.empty(4, 6, 8))]
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in out]

    real = results()
    with Dataless():
        assert results() == real
    assert not is_dataless(torch.zeros(1))


def test_what_depends_on_values_is_refused():
    with Dataless(), pytest.raises(Exception, match="nonzero"):
        torch.ones(4).nonzero()
