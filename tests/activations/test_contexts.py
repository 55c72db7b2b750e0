"""The contexts as callers make them: what is refused, BatchNorms, and copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from s2a_cli.activations import ActivationMode, checkpointed, compress_activations
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import QuantConfig

LAYERS = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
NO_BLOCKS = ("blocks", ["blocks.0"], None, 3, LAYERS[0], dict.fromkeys("ab", LAYERS[0]))


@pytest.mark.parametrize("blocks", NO_BLOCKS, ids=str)
def test_what_is_no_list_of_modules_is_refused(blocks):
    for make in (checkpointed, lambda blocks: compress_activations("tiny", blocks)):
        with pytest.raises(UserError, match=r"^blocks: expected modules in a list, such as model\.blocks, not [^\n]+$"):
            make(blocks)


def test_what_is_no_config_is_refused():
    with pytest.raises(UserError, match="config: expected a QuantConfig or a name such as 'tiny', not 4"):
        compress_activations(4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("number", "blocks"), [(0, []), (99, LAYERS), (-1, LAYERS)], ids=["none", "99", "-1"])
def test_settings_of_a_block_that_is_not_there_are_refused(number, blocks):
    with pytest.raises(UserError, match=f"no block {number} is among the {len(blocks)} given"):
        compress_activations(QuantConfig(bits=4, blocks={number: {"norm": 8}}), blocks)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)))


@pytest.mark.parametrize("settings", [{"recompute": "block"}, {"chunks": 4}, {"blocks": {1: {"chunks": 2}}}], ids=str)
def test_batch_norms_in_training_mode_are_refused_in_blocks_that_are_divided(settings):
    """They would count each pass, and normalise by other batches."""
    model, x = convolutions(), torch.randn(8, 3, 9, 9)
    memory = compress_activations(QuantConfig(lossless=False, **settings), model)
    with memory, pytest.raises(UserError, match=r"block [01] \(Sequential\) has BatchNorms in training mode"):
        model(x)
    for block in model:
        block[1].eval()
    wanted = model(x)
    with memory:
        found = model(x)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert all(block[1].num_batches_tracked <= 1 for block in model)


def test_batch_norms_in_training_mode_stay_where_codes_alone_are_kept():
    model, x = convolutions(), torch.randn(8, 3, 9, 9)
    with compress_activations(QuantConfig(bits=8), model):
        model(x).sum().backward()
    assert all(block[1].num_batches_tracked == 1 for block in model)


class Holder(nn.Module):
    """A model beside its memory, as in a LightningModule."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)))
        self.memory = compress_activations(QuantConfig(bits=4, recompute="block"), self.blocks)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_begins_anew_with_the_blocks_of_the_copy(how):
    first, x = Holder(), torch.randn(3, 4)
    with first.memory:
        first.blocks(x).sum().backward()
    if how == "deepcopy":
        second = copy.deepcopy(first)
    else:
        torch.save(first, file := io.BytesIO())
        file.seek(0)
        second = torch.load(file, weights_only=False)
    for one in (first.memory, second.memory):
        assert isinstance(one, ActivationMode)
    assert [block.module for block in second.memory.blocks] == list(second.blocks)
    assert first.memory.calibration.fitted() and not second.memory.calibration.fitted()
    with second.memory:
        second.blocks(x).sum().backward()
    assert second.memory.calibration.fitted().keys() == first.memory.calibration.fitted().keys()
