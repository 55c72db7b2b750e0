"""Settings of what is kept, made in Python: they mean what they mean on the command line, or are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from s2a_cli.activations import ActivationMode, compress_activations
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
    assert QuantConfig(bits=composed.bits, **given) == composed
    said = compose([f"quant={name}", "quant.bits=3"]).quant
    follow = [family for family in CODED if getattr(composed, family) == composed.bits]
    assert all(said[family] == (3 if family in follow else getattr(composed, family)) for family in CODED)


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
