"""Frozen weights in the host's memory: gradients to the bit, two blocks on the device, files as the system's cache."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from test_weight_quant import BACKBONES, gradients, images_for, made
from torch import nn

from s2a_cli import backbones
from s2a_cli.activations import REFERENCE
from s2a_cli.activations.chunk_sizes import planned_for
from s2a_cli.backbones import frozen_weights, weight_offload
from s2a_cli.backbones.pretrained import map_tensors
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.memory import Profile, profile, track
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.training.step import Step, make_optimizer

QUANTS = {
    "none": REFERENCE,
    "exact": QuantConfig(name="exact"),
    "recomputed": QuantConfig(name="recomputed", bits=4, recompute="block", input=8, chunks=2),
}
CASES = [("vit", "none", "cpu"), ("vit", "recomputed", "cpu"), ("vit", "none", "cuda"), ("vit", "recomputed", "cuda")]
CASES += [("beit", "none", "cuda"), ("swin", "none", "cuda"), ("convnext", "none", "cuda"), ("resnet", "exact", "cuda")]


def offloaded(name: str = "vit", computing: torch.dtype | None = None) -> backbones.Backbone:
    backbone = made(name, dtype=torch.float32)
    frozen_weights.store(backbone, "offload", computing)
    return backbone


def copies(monkeypatch) -> list[int]:
    """Returns a list to which each block that is copied to the device adds its number."""
    copied, copy_block = [], weight_offload.Buffers._copy
    monkeypatch.setattr(
        weight_offload.Buffers,
        "_copy",
        lambda self, block, slot: (copied.append(block), copy_block(self, block, slot))[1],
    )
    return copied


@pytest.mark.parametrize("name, kept, device", CASES)
def test_gradients_are_those_of_weights_that_stay_to_the_bit(name, kept, device):
    """Where CUDA is planned for, the weights are copied as they are to it, into two buffers on the CPU."""
    backbone, twin, quant = offloaded(name), made(name, dtype=torch.float32), QUANTS[kept]
    with planned_for(device):
        expected = gradients(twin, quant)
        for _ in range(2):
            got = gradients(backbone, quant)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_autocast_computes_the_same_and_copies_half_the_bytes():
    dtype = torch.bfloat16
    backbone, narrow, twin = offloaded(), offloaded(computing=dtype), made(dtype=torch.float32)
    assert narrow.model.offload.a.dtype == dtype and backbone.model.offload.a.dtype == torch.float32
    with planned_for("cuda"), torch.autocast("cpu", dtype):
        expected = gradients(twin)
        for other in (backbone, narrow):
            got = gradients(other)
            assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_each_block_is_copied_once_forward_and_once_backward(monkeypatch):
    """The two last ones are still there when the backward pass begins, the two first ones when it ends."""
    kwargs = BACKBONES["vit"][1] | {"depth": 5}
    monkeypatch.setitem(BACKBONES, "deep", (BACKBONES["vit"][0], kwargs, None))
    backbone, copied = offloaded("deep"), copies(monkeypatch)
    blocks = len(backbone.model.offload.blocks)
    assert blocks == 6  # the patch embedding, too
    with planned_for("cuda"):
        gradients(backbone)
        assert copied == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
        copied.clear()
        gradients(backbone, QuantConfig(name="recomputed", recompute="block", chunks=4))
    assert copied == [2, 3, 4, 5, 3, 2, 1, 0]


def test_depth_costs_no_device_memory(monkeypatch):
    peaks = []
    for depth in (3, 5):
        kwargs = BACKBONES["vit"][1] | {"depth": depth, "embed_dim": 128}
        monkeypatch.setitem(BACKBONES, "deep", (BACKBONES["vit"][0], kwargs, None))
        found = []
        for kind in ("fp32", "offload"):
            backbone = made("deep", "linear", torch.float32)
            frozen_weights.store(backbone, kind)
            found.append(_profile(backbone).by("use")[("weights",)] / MIB)
        peaks.append(found)
    block = 12 * 128**2 * 4 / MIB
    assert peaks[1][0] - peaks[0][0] == pytest.approx(2 * block, rel=0.02)
    assert peaks[1][1] - peaks[0][1] == pytest.approx(0, abs=0.04 * block)  # norms and biases
    assert peaks[0][1] == pytest.approx(2 * block, rel=0.1)


def _arguments(backbone: backbones.Backbone, quant: str = "none") -> tuple:
    config = compose(["method=bias", f"quant={quant}", "optim.batch_size=4"])
    step = Step(config, torch.device("cpu"), Attachment(backbone))
    batch = images_for(backbone), torch.arange(4)
    return backbone.model, batch, step, lambda model: make_optimizer(config.optim, model)


def _profile(backbone: backbones.Backbone) -> Profile:
    return profile(*_arguments(backbone))


def test_predicted_memory_is_that_of_real_tensors_and_leaves_them_alone():
    backbone, twin = offloaded(), made(dtype=torch.float32)
    expected = gradients(twin)
    with planned_for("cuda"):
        gradients(backbone)
    first = _profile(backbone).memory
    assert _profile(backbone).memory == first
    with planned_for("cuda"):
        got = gradients(backbone)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert track(*_arguments(backbone)) == first


def test_weights_survive_copies_changes_of_dtype_and_being_parameters_again():
    backbone = offloaded()
    before = made(dtype=torch.float32).model.state_dict()
    other = copy.deepcopy(backbone.model)
    other.blocks[0].mlp.fc1.host.zero_()
    with planned_for("cuda"):
        expected = gradients(backbone)
        assert torch.equal(gradients(backbone)["loss"], expected["loss"])
    backbone.model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(backbone.model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    frozen_weights.restore(backbone.model)
    assert not hasattr(backbone.model, "offload") and type(backbone.model.blocks[0].mlp.fc1) is nn.Linear
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        same = before[key] if "bias" not in key and "norm" not in key else before[key].bfloat16().float()
        if "weight" in key and "norm" not in key and not key.startswith("head"):
            assert torch.equal(after[key], same), key


@pytest.mark.parametrize("given", [True, False])
def test_weights_of_a_file_are_the_systems_cache_of_it(given, tmp_path, monkeypatch):
    """A file that is read is mapped, which shows in /proc; one from the hub is found in its cache."""
    kwargs = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    config = BackboneConfig(name="vit", timm="vit_tiny_patch16_224", pretrained=False, kwargs=kwargs, weights="offload")
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(backbones.build(config, 4).model.state_dict(), file)
    content = file.read_bytes()
    model = backbones.build(config, 4).model
    model.load_state_dict(safetensors.torch.load_file(file))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(file))
    map_tensors(model, str(file) if given else "")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(file) in line]
    ranges = [(int(low, 16), int(high, 16)) for low, high in ranges]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), name
    with torch.no_grad():
        model.head.bias.add_(1)  # what trains is the process's own from the first change on
    assert file.read_bytes() == content


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("computing", [None, torch.bfloat16])
@pytest.mark.parametrize("kept", QUANTS)
def test_on_cuda(kept, computing, monkeypatch):
    """Copies take longer than the device computes: one that nobody waits for would show."""
    monkeypatch.setitem(
        BACKBONES, "wide", (BACKBONES["vit"][0], BACKBONES["vit"][1] | {"embed_dim": 2048, "depth": 6}, None)
    )
    twin, backbone = made("wide", dtype=torch.float32), offloaded("wide", computing)
    found = []
    for one in (twin, backbone, backbone, backbone):
        one.model.cuda()
        with torch.device("cuda"), torch.autocast("cuda", computing, enabled=computing is not None):
            found.append(gradients(one, QUANTS[kept]))
    for got in found[1:]:
        assert all(torch.equal(got[key], found[0][key]) for key in got)
