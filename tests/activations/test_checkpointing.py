"""Blocks in pieces and recomputed blocks: the same gradients, fewer bytes, the same random numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli import backbones
from s2a_cli.activations import REFERENCE, compress_activations
from s2a_cli.activations.probe import leaves
from s2a_cli.activations.quant.packing import groupwise_size
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.training.step import train_mode

BATCH = 5
BACKBONES = {
    "vit": BackboneConfig(
        name="vit",
        timm="vit_tiny_patch16_224",
        pretrained=False,
        kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
    ),
    "scaled": BackboneConfig(  # LayerScale behind the last product of a block, and relative positions
        name="scaled",
        timm="beit_base_patch16_224",
        pretrained=False,
        kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    ),
    "postnorm": BackboneConfig(  # a LayerNorm reads the last product of a block
        name="postnorm",
        timm="swinv2_tiny_window8_256",
        pretrained=False,
        kwargs={
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "drop_path_rate": 0.0,
        },
    ),
    "convnext": BackboneConfig(
        name="convnext",
        timm="convnext_atto",
        pretrained=False,
        image_size=64,
        kwargs={"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]},
    ),
    "resnet": BackboneConfig(name="resnet", timm="resnet18", pretrained=False, image_size=96),
}


def made(backbone: str, method: str, **kwargs) -> backbones.Backbone:
    torch.manual_seed(0)
    config = BACKBONES[backbone]
    config = BackboneConfig(**{**config.__dict__, "kwargs": {**config.kwargs, **kwargs}})
    found = backbones.build(config, 4)
    small = {"side": ["method.width=4"], "s2a": ["method.side.width=4", "method.prompt.rank=2"]}.get(method, [])
    STRUCTURES[method](compose([f"method={method}", *small]).method).attach(found)
    train_mode(found.model.double())
    for p in found.model.parameters():
        if not p.any():  # merges and prompts that start at zero pass no gradient on
            nn.init.normal_(p, std=0.02)
    return found


def gradients(backbone: backbones.Backbone, quant: QuantConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    size = backbone.image.size
    images = torch.randn(BATCH, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    with compress_activations(quant, backbone.block_modules):
        loss = losses_of(backbone.model(images), torch.arange(BATCH) % 4).sum()
    backbone.model.zero_grad()
    loss.backward()
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def quant(lossless: bool = False, **kwargs) -> QuantConfig:
    return QuantConfig(name="test", lossless=lossless, **kwargs)


@pytest.mark.parametrize("method", ["full", "bias", "s2a", "side"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "config",
    [{"recompute": "block"}, {"chunks": 2}, {"chunks": None}, {"recompute": "block", "chunks": 3, "lossless": True}],
    ids=str,
)
def test_gradients_are_those_of_stock(backbone, method, config, set_chunk_sizes):
    set_chunk_sizes(mlp=1)
    if (backbone, method) == ("resnet", "full"):
        pytest.skip("BatchNorms that train normalise over the whole batch")
    found = made(backbone, method)
    expected, got = gradients(found, REFERENCE), gradients(found, quant(**config))
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("lossless", [False, True])
def test_random_numbers_are_those_of_the_forward_pass(lossless):
    """With one piece the draws are stock's, with several those of the pieces: as if stock saw them one after
    another.
    """
    found = made("vit", "bias", drop_path_rate=0.5, proj_drop_rate=0.3)
    stock, once = gradients(found, REFERENCE), gradients(found, quant(lossless, recompute="block"))
    for name in stock:
        torch.testing.assert_close(once[name], stock[name], msg=name)
    pieces = gradients(found, quant(lossless, chunks=BATCH))
    again = gradients(found, quant(lossless, chunks=BATCH, recompute="block"))
    assert not torch.equal(pieces["loss"], stock["loss"])
    for name in pieces:
        torch.testing.assert_close(again[name], pieces[name], msg=name)


def test_a_backward_pass_leaves_the_random_numbers_alone():
    found = made("vit", "bias", proj_drop_rate=0.3)
    with compress_activations(quant(recompute="block", chunks=2), found.block_modules):
        loss = found.model(torch.zeros(BATCH, 3, 32, 32, dtype=torch.float64)).sum()
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bits, at_least", [(8, 0.9995), (16, 0.9999), (4, 0.95)])
def test_a_coded_input_gives_nearly_the_gradient(bits, at_least):
    found = made("vit", "bias")
    exact = gradients(found, REFERENCE)
    coded = gradients(found, quant(recompute="block", input=bits, chunks=2))
    assert torch.equal(coded.pop("loss"), exact.pop("loss"))  # the forward pass is exact
    exact, coded = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, coded))
    assert not torch.equal(exact, coded)
    assert F.cosine_similarity(exact, coded, 0) > at_least


@pytest.mark.parametrize(
    "bits, kept",
    [(None, 8 * 17 * 32), (16, 2 * 17 * 32), (8, groupwise_size(17, 32, 64, 8)), (4, groupwise_size(17, 32, 64, 4))],
)
def test_kept_bytes_are_those_of_the_inputs(bits, kept):
    found = made("vit", "bias")
    block = found.block_modules[1]
    x = torch.randn(8, 17, 32, dtype=torch.float64, requires_grad=True)
    memory = compress_activations(quant(recompute="block", input=bits, chunks=4), [block])

    def run() -> torch.Tensor:
        with memory:
            return block(x)

    run()  # the first call looks at one sample
    if bits is None:  # the input itself, which is there anyway
        assert saved_bytes(run, found.model) == x.numel() * 8
    else:
        assert saved_bytes(run, found.model) == 8 * kept


def test_a_block_that_keeps_less_than_its_input_is_not_recomputed():
    """A block of ReLUs and frozen convolutions keeps one bit an element."""
    found = made("resnet", "bias")
    calls = []
    found.block_modules[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    gradients(found, quant(lossless=True, recompute="block", input=8))
    assert len(calls) == 2  # a sample to look at, and the forward pass
    calls.clear()
    gradients(found, quant(lossless=False, recompute="block", input=8))  # stock keeps every input
    assert len(calls) == 3


def test_the_last_product_of_a_block_is_not_computed_again():
    found = made("vit", "bias")
    rows = []
    block = found.block_modules[0]
    real = F.linear

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                rows.append(tuple(args[-1].shape))
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 17, 32, dtype=torch.float64, requires_grad=True)
    memory = compress_activations(quant(recompute="block"), [block])
    with memory:
        out = block(x)
    with Count():
        out.sum().backward()
    forward = rows[: len(rows) - 4]  # the gradients of four products come last
    assert real is F.linear and (128, 32) not in forward and (32, 128) in forward


def test_blocks_without_anything_trained_have_no_graph():
    found = made("vit", "linear")
    kept = []
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with saved, compress_activations(quant(recompute="block", chunks=2), found.block_modules):
        out = found.block_modules[0](torch.randn(4, 17, 32, dtype=torch.float64))
    assert not out.requires_grad and not kept


def test_evaluation_runs_in_pieces():
    found = made("vit", "bias")
    sizes = []
    found.block_modules[0].norm1.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    images = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = found.model(images)
        sizes.clear()
        with compress_activations(quant(chunks=2), found.block_modules):
            torch.testing.assert_close(found.model(images), expected)
    assert sizes == [3, 2]


def test_pieces_as_the_device_wants_them(set_chunk_sizes):
    """A block that keeps codes runs whole and its MLP in pieces; one that is computed again runs in pieces itself."""
    found = made("vit", "bias")
    inner, sizes = found.block_modules[0], {"norm1": [], "mlp.fc1": []}
    for name, seen in sizes.items():
        inner.get_submodule(name).register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
    images = torch.randn(10, 3, found.image.size, found.image.size, dtype=torch.float64)
    image = found.model.forward_features(images)[0].numel()  # elements of the hidden state
    set_chunk_sizes(block=10 * image, mlp=5 * image, recomputed=3 * image)
    for config, expected in (
        (quant(chunks=None), {"norm1": [10], "mlp.fc1": [5, 5]}),
        (quant(chunks=None, recompute="block"), {"norm1": [4, 4, 2], "mlp.fc1": [4, 4, 2]}),
        (quant(chunks=1), {"norm1": [10], "mlp.fc1": [10]}),
        (quant(chunks=5), {"norm1": [2] * 5, "mlp.fc1": [2] * 5}),
    ):
        memory = compress_activations(config, found.block_modules)
        for _ in range(2):  # the first pass looks at one sample beforehand
            for seen in sizes.values():
                seen.clear()
            with memory:
                found.model(images)
        assert sizes == expected, config


@pytest.mark.parametrize("expansion, expected", [(6, [2, 2, 2, 2, 2]), (2, [10])])
def test_a_block_with_wide_layers_and_no_mlp_runs_in_smaller_pieces(set_chunk_sizes, expansion, expected):
    set_chunk_sizes(wide=2 * 4 * 8 * 8)  # two images of 4 x 8 x 8
    block = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4 * expansion, 1), torch.nn.ReLU(), torch.nn.Conv2d(4 * expansion, 4, 1)
    )
    x, seen = torch.randn(10, 4, 8, 8, requires_grad=True), []
    exact = torch.autograd.grad(block(x).square().sum(), x)[0]
    block[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    memory = compress_activations(quant(lossless=True, chunks=None), [block])
    for _ in range(2):
        seen.clear()
        with memory:
            y = block(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], exact)
    assert seen == expected


def test_the_modules_are_left_as_they_were():
    found = made("vit", "bias")
    memory = compress_activations(quant(chunks=2), found.block_modules)
    with pytest.raises(ZeroDivisionError), memory:
        assert found.block_modules[0].forward.block is memory.blocks[0]
        1 / 0
    assert all("forward" not in block.__dict__ for block in found.block_modules)
    with memory:  # and it can be entered again
        pass


def test_parts_for_each_sample_are_not_torn_from_their_samples():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.linear(x) * mask

    block, x, mask = Masked(), torch.randn(6, 4, requires_grad=True), torch.rand(6, 1)
    with compress_activations(quant(recompute="block", chunks=3), [block]):
        out = block(x, mask)
    torch.testing.assert_close(out, block(x, mask))


def test_leaves_are_the_trained_tensors():
    a, b, frozen = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), torch.ones(1)
    assert {id(t) for t in leaves([a * b * frozen + a])} == {id(a), id(b)}
    assert leaves([frozen * 2]) == []


def test_double_backward_is_refused():
    block = made("vit", "bias").block_modules[0]
    x = torch.randn(2, 17, 32, dtype=torch.float64, requires_grad=True)
    with compress_activations(quant(recompute="block"), [block]):
        out = block(x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_autocast_is_that_of_the_forward_pass():
    found = made("vit", "bias")
    found.model.float()
    images = torch.randn(BATCH, 3, 32, 32)
    grads = []
    for config in (REFERENCE, quant(recompute="block", chunks=2)):
        found.model.zero_grad()
        with compress_activations(config, found.block_modules), torch.autocast("cpu", torch.bfloat16):
            loss = losses_of(found.model(images).float(), torch.arange(BATCH) % 4).sum()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in found.model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*grads, 0) > 0.999


class Conditioned(nn.Module):
    """Multiplies by a factor that was set from outside."""

    def __init__(self):
        super().__init__()
        self.inner, self.factor = nn.Linear(8, 8), torch.ones(8)

    def forward(self, x):
        return x + torch.tanh(self.inner(x)) * self.factor


def test_a_tensor_with_a_history_that_is_no_argument_is_refused_where_blocks_are_recomputed():
    torch.manual_seed(0)
    blocks, z, x = nn.ModuleList(Conditioned() for _ in range(2)), torch.randn(8, requires_grad=True), torch.randn(4, 8)

    def run(recompute: str) -> None:
        factor = torch.tanh(z).exp()
        mode = compress_activations(quant(lossless=True, recompute=recompute, chunks=2), list(blocks))
        with mode:
            y = x
            for block in blocks:
                block.factor = factor
                y = block(y)
        y.sum().backward()

    with pytest.raises(UserError, match=r"block 0 \(Conditioned\) reads a tensor that other operators made outside"):
        run("block")
    run("none")
    assert z.grad is not None


@pytest.mark.parametrize("config", [{"recompute": "block"}, {"chunks": 2}])
def test_a_mask_for_each_head_of_each_sample_stays_with_them(config):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0)
    x, mask = torch.randn(4, 6, 24), torch.randn(8, 6, 6)
    expected = torch.autograd.grad(layer(x, src_mask=mask).square().sum(), list(layer.parameters()))
    with compress_activations(quant(lossless=True, **config), [layer]):
        y = layer(x, src_mask=mask)
    found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    for mine, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)
