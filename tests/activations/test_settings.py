"""Settings of what is kept, made in Python: they mean what they mean on the command line, or are refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from s2a_cli.activations import ActivationMode, checkpointed, compress_activations
from s2a_cli.config.compose import compose, groups
from s2a_cli.config.schema import CODED, QuantConfig


def test_bits_are_the_default_of_the_families():
    assert all(getattr(QuantConfig(bits=4), family) == 4 for family in CODED)
    mixed = QuantConfig(bits=4, norm=8, attention=None)
    assert (mixed.pointwise, mixed.norm, mixed.attention, mixed.softmax, mixed.linear) == (4, 8, None, 4, None)
    assert all(getattr(QuantConfig(), family) is None for family in CODED)
    x = torch.randn(4, 64, requires_grad=True)
    with compress_activations(QuantConfig(name="int4", bits=4)):
        assert type(F.gelu(x).grad_fn).__name__ == "ElementwiseBackward"


@pytest.mark.parametrize("name", sorted(set(groups()["quant"]) - {"auto"}))
def test_a_preset_is_the_same_from_python(name):
    composed = OmegaConf.to_object(compose([f"quant={name}"]).quant)
    usual = QuantConfig(bits=composed.bits)
    given = {key: value for key, value in vars(composed).items() if value != getattr(usual, key)}
    assert QuantConfig(bits=composed.bits, **given) == composed == QuantConfig.named(name)
    said = compose([f"quant={name}", "quant.bits=3"]).quant
    follow = [family for family in CODED if getattr(composed, family) == composed.bits]
    assert QuantConfig.named(name, bits=3) == OmegaConf.to_object(said)
    assert all(said[family] == (3 if family in follow else getattr(composed, family)) for family in CODED)


def test_a_name_and_keywords_make_the_same_context():
    block = nn.Sequential(nn.Linear(2, 2))
    for found, wanted in (
        (compress_activations(bits=4, norm=8), QuantConfig(bits=4, norm=8)),
        (compress_activations("int4", group=32), QuantConfig.named("int4", group=32)),
        (compress_activations("tiny", block), QuantConfig(recompute="block", input=8, chunks=None)),
        (checkpointed(block, bits=16), QuantConfig(lossless=False, recompute="block", input=16)),
        (compress_activations(), QuantConfig()),
    ):
        assert isinstance(found, ActivationMode) and replace(found.config, name=wanted.name) == wanted
    assert isinstance(compress_activations("none"), nullcontext)


def test_checkpointed_blocks_have_the_gradients_of_stock():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)) for _ in range(3))).double()
    x, found = torch.randn(4, 6, dtype=torch.float64), []
    for memory in (nullcontext(), checkpointed(model), checkpointed(model, chunks=2)):
        with memory:
            loss = model(x).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for exact, whole, halves in zip(*found):
        assert torch.equal(whole, exact)
        torch.testing.assert_close(halves, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("tinny", "quant='tinny': expected one of .*did you mean 'tiny'"),
        ("auto", "quant='auto': expected one of"),
        (QuantConfig(name="tiny"), r"has a name and no settings; those of that name are QuantConfig\.named\('tiny'\)"),
    ],
    ids=str,
)
def test_a_name_that_does_not_do_what_it_says_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        compress_activations(config)


def test_settings_of_one_block():
    config = QuantConfig(bits=4, norm=8, blocks={1: {"bits": 2}, 2: {"norm": None, "bits": 6}, 3: {"group": 32}})
    assert config.of_block(0) == config
    found = [[getattr(config.of_block(number), family) for family in CODED] for number in (1, 2, 3)]
    assert found == [[2, 8, 2, 2], [6, None, 6, 6], [4, 8, 4, 4]] and config.of_block(3).group == 32
    mode = compress_activations(config, [nn.Linear(2, 2) for _ in range(4)])
    assert isinstance(mode, ActivationMode) and [block.config.pointwise for block in mode.blocks] == [4, 2, 6, 4]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"bits": 9}, "bits=9: expected an integer from 1 to 8, or null; pointwise=9"),
        ({"norm": 4.0}, "norm=4.0: expected an integer from 1 to 8, or null"),
        ({"recompute": "blocks"}, "recompute=blocks: expected one of none, block"),
        ({"rounding": "up"}, "rounding=up: expected one of nearest, stochastic"),
        ({"lossless": "yes"}, "lossless=yes: expected true or false"),
        ({"chunks": 0}, "chunks=0: expected an integer of at least 1"),
        ({"input": 8}, "input=8 is of recomputed blocks: set recompute='block' too"),
        ({"blocks": {0: {"nrom": 4}}}, r"quant.blocks.0.nrom: expected one of .*did you mean 'norm'"),
        ({"blocks": {0: {"norm": 12}}}, "quant.blocks.0.norm=12: expected an integer from 1 to 8"),
        ({"recompute": "block"}, "recompute='block' needs the blocks"),
    ],
)
def test_what_says_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        compress_activations(QuantConfig(**settings))


def test_a_misspelt_setting_is_no_setting():
    with pytest.raises(TypeError, match="pointwize"):
        QuantConfig(pointwize=4)
