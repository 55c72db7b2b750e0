"""A finished run's model, ready to use."""

from __future__ import annotations

import pytest
import torch

from s2a_cli import data
from s2a_cli.common.errors import UserError
from s2a_cli.training.trained import load


def test_a_loaded_run_answers_as_it_was_tested(finished):
    folder, result = finished
    before = torch.get_rng_state()
    trained = load(folder, ["device=cpu"])
    assert torch.equal(before, torch.get_rng_state())
    test = data.load(trained.config.dataset).test
    images = torch.stack([trained.transform(test.image(i)) for i in range(len(test))])
    logits = trained(images)
    assert logits.shape == (len(test), len(trained.classes)) and not logits.requires_grad
    right = (logits.argmax(1) == torch.tensor(test.labels)).sum().item()
    assert 100 * right / len(test) == result["accuracy"]["test_top1"]


def test_what_cannot_be_loaded(finished, tmp_path):
    with pytest.raises(UserError, match="no result.json there"):
        load(tmp_path)
    with pytest.raises(UserError, match="a finished run keeps its method"):
        load(finished[0], ["method=bias"])
    with pytest.raises(UserError, match="trained on backbone weights"):
        load(finished[0], ["backbone.pretrained=false"])
    with pytest.raises(UserError, match="^run: expected the folder of a run, not None$"):
        load(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"^overrides: expected a list of words, .* not 'device=cpu'$"):
        load(finished[0], "device=cpu")
