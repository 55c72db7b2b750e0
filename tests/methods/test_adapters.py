"""What adapters compute in a block, written out; what is kept of them; what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layouts import CLASSES, loss_of, made_config, make, make_attached, quant
from timm.layers import BatchNormAct2d, ScaledStdConv2d
from torch import nn

from s2a_cli import backbones
from s2a_cli.activations import REFERENCE, compress_activations
from s2a_cli.backbones import Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts.bottleneck import OnMap
from s2a_cli.methods.ssf import is_plain
from s2a_cli.training.step import train_mode

ADAPTERS = [
    "adapter_houlsby",
    "adapter_pfeiffer",
    "adapter_plus",
    "adaptformer",
    "convpass",
    "mona",
    "repadapter",
    "ssf",
]
PREFIX, SIDE = 1, 4  # of the tiny ViT: class token, patches of a side
IMAGES, TARGETS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4)


def attached(method: str):
    """A tiny ViT in evaluation and float64, with something learned in every adapter."""
    made = make_attached("vit", method)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.model.double().named_parameters():
        if name.startswith("s2a."):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made.model.eval()


def quick(x):
    return x * torch.sigmoid(1.702 * x)


def through(inner, x, function):
    return F.linear(function(F.linear(x, inner.down.weight, inner.down.bias)), inner.up.weight, inner.up.bias)


def over_map(x, convolve):
    """The patches as a map, and the class token as one of a single position."""
    token, patches = x[:, :PREFIX, :, None], x[:, PREFIX:].transpose(1, 2).unflatten(-1, (SIDE, SIDE))
    return torch.cat([convolve(token.transpose(1, 2)).flatten(2), convolve(patches).flatten(2)], dim=-1).transpose(1, 2)


def convpass(inner, n):
    kernel, bias = inner.middle[1].module.weight, inner.middle[1].module.bias
    return through(inner, n, lambda z: quick(over_map(quick(z), lambda m: F.conv2d(m, kernel, bias, padding=1))))


def mona(inner, x):
    norm, bottleneck = inner
    y = norm.a * ((1 + norm.w_less_1) * F.layer_norm(x, x.shape[-1:]) + norm.c) + norm.b * x
    filters = bottleneck.middle[0].module

    def convolve(m):
        total = sum(F.conv2d(m, f.weight, f.bias, padding=f.padding, groups=f.groups) for f in filters.filters)
        m = m + total / 3
        return m + F.conv2d(m, filters.project.weight, filters.project.bias)

    return through(bottleneck, y, lambda z: F.gelu(over_map(z, convolve)))


def houlsby(h, block, f, g):
    e = block.attn(block.norm1(h))
    h = h + e + through(f, e, F.gelu)
    e = block.mlp(block.norm2(h))
    return h + e + through(g, e, F.gelu)


def pfeiffer(h, block, f, g):
    h = h + block.attn(block.norm1(h))
    e = block.mlp(block.norm2(h))
    return h + e + through(f, e, quick)


def adaptformer(h, block, f, g):
    h = h + block.attn(block.norm1(h))
    return h + block.mlp(block.norm2(h)) + 0.1 * through(f, h, F.relu)


def adapter_plus(h, block, f, g):
    h = block(h)
    return h + f.factors * through(f, h, F.gelu)


def with_convpass(h, block, f, g):
    n = block.norm1(h)
    h = h + block.attn(n) + convpass(f, n)
    n = block.norm2(h)
    return h + block.mlp(n) + convpass(g, n)


def with_mona(h, block, f, g):
    h = h + block.attn(block.norm1(h))
    h = h + mona(f, h)
    h = h + block.mlp(block.norm2(h))
    return h + mona(g, h)


FORMULAS = {  # method -> a block's output, of its input h, the plain block and the first two adapters
    "adapter_houlsby": houlsby,
    "adapter_pfeiffer": pfeiffer,
    "adapter_plus": adapter_plus,
    "adaptformer": adaptformer,
    "convpass": with_convpass,
    "mona": with_mona,
}


@pytest.mark.parametrize("method", FORMULAS)
def test_a_block_computes_what_the_source_defines(method):
    model = attached(method)
    block = make("vit").model.double().eval().blocks[0]
    h = torch.randn(2, PREFIX + SIDE**2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f, g = (adapter.inner for adapter in list(model.s2a[method])[:2])
    with torch.no_grad():
        expected = FORMULAS[method](h, block, f, g)
        torch.testing.assert_close(model.blocks[0](h), expected, rtol=1e-10, atol=1e-10)
    assert (expected - block(h)).abs().max() > 0.05
    assert all(adapter._seen is None for adapter in model.s2a[method])


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_recomputed_block_has_the_gradients_of_a_kept_one(method):
    """Adapters act within the block, so that it recomputes them."""
    dropout = {"adapter_houlsby": {}, "ssf": {}, "adapter_plus": {"drop_path": 0.0}}.get(method, {"dropout": 0.0})
    made = make_attached("vit", method, **dropout)
    train_mode(made.model)
    blocks = [block.module for block in made.backbone.blocks]
    found, kept = [], []
    for config in (REFERENCE, QuantConfig(lossless=False, recompute="block", chunks=2)):
        memory = compress_activations(config, blocks)

        def loss(memory=memory):
            with memory:
                return F.cross_entropy(made.model(IMAGES), TARGETS)

        trained = [p for p in made.model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss(), trained))
        kept.append(saved_bytes(loss, made.model))
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-7)
    outside = 4 * 16 * 48 * len(IMAGES) if method == "ssf" else 0  # of the patch embedding, which is in no block
    assert kept[1] <= 4 * IMAGES.shape[0] * 17 * 48 * (len(blocks) + 3) + outside + 2000 < kept[0]


def test_bytes_kept_of_an_adapter_grow_with_what_lies_between_its_layers():
    kept = [kept_bytes("adapter_houlsby", None, dim=dim) for dim in (8, 24)]
    adapters, positions = 2 * 3, 4 * (PREFIX + SIDE**2)
    assert kept[1] - kept[0] == adapters * positions * 4 * 2 * 16  # the input of GELU and that of the second layer


def test_outputs_that_are_scaled_are_kept_as_codes():
    """Of the 11 widths a block of ViT scales and shifts, 4 bits an element and their scales."""
    kept = [kept_bytes("ssf", bits) for bits in (None, 4)]
    assert kept[1] < 0.3 * kept[0]


def kept_bytes(method: str, bits: int | None, **settings) -> int:
    made = make_attached("vit", method, **settings)
    train_mode(made.model)
    return saved_bytes(lambda: loss_of(made.backbone, quant(bits)), made.model)


def test_a_convolution_reads_the_patches_alone():
    """Also where others have put tokens between the class token and the patches."""
    convolution = nn.Conv2d(3, 3, 3, padding=1)
    on_map = OnMap(Hidden("tokens", (1 + 16, 48), prefix=1), convolution)
    x = torch.randn(2, 1 + 5 + 16, 3)
    with torch.no_grad():
        y = on_map(x)
        patches = convolution(x[:, 6:].transpose(1, 2).reshape(2, 3, 4, 4)).flatten(2).transpose(1, 2)
        centre = F.linear(x[:, :6], convolution.weight[:, :, 1, 1], convolution.bias)
        channels_last = OnMap(Hidden("channels_last", (2, 8, 48)), convolution)(x[:, 6:].reshape(2, 2, 8, 3))
    torch.testing.assert_close(y, torch.cat([centre, patches], dim=1))
    assert channels_last.shape == (2, 2, 8, 3)


def test_layers_with_more_than_a_weight_and_a_bias_are_not_scaled():
    assert is_plain(nn.Conv2d(4, 4, 3)) and is_plain(nn.BatchNorm2d(4))
    assert not is_plain(ScaledStdConv2d(4, 4, 3)) and not is_plain(BatchNormAct2d(4))
    made = make_attached("resnet", "ssf")
    scaled = [m for m in made.model.modules() if m._forward_hooks]
    assert scaled and all(isinstance(m, nn.BatchNorm2d) for m in scaled)


@pytest.mark.parametrize("method", ["adaptformer", "repadapter"])
def test_a_block_without_such_branches_is_refused(method):
    """CaiT ends both branches in one module, and its attention has four linear layers."""
    config = BackboneConfig(name="cait", timm="cait_xxs24_224", pretrained=False, kwargs={"depth": 1})
    with pytest.raises(UserError, match=f"method={method}: does not fit Cait"):
        STRUCTURES[method](made_config("vit", method)).attach(backbones.build(config, CLASSES, meta=True))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="groups=5 of the RepAdapter does not divide dim=8 and .*: 48"):
        make_attached("vit", "repadapter", groups=5)
