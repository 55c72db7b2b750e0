"""quant=auto: the best bits for the bytes, measured costs that add up, a predicted peak within the budget."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli import backbones, methods
from s2a_cli.activations import REFERENCE
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.result import MIB
from s2a_cli.training import bit_allocation, forecast, trainer
from s2a_cli.training.bit_allocation import Costs, Gradient, allocate, measure
from s2a_cli.training.step import train_mode

TINY = ["backbone=vit_micro", "backbone.pretrained=false", "+backbone.kwargs.depth=2", "optim.batch_size=32"]


def gradient_of(*words: str) -> Gradient:
    config = compose([*TINY, "method=bias", "quant=auto", "quant.budget_mib=1000", *words])
    torch.manual_seed(0)
    backbone = backbones.build(config.backbone, 10)
    attached = methods.attach(config.method, backbone)
    train_mode(backbone.model)
    size = backbone.image.size
    return Gradient(config, attached, (torch.randn(4, 3, size, size), torch.arange(4)), torch.device("cpu"))


def predicted(gradient: Gradient):
    def peak(quant, micro_batch=None):
        changed = {"quant": OmegaConf.structured(quant), "optim": {"micro_batch": micro_batch}}
        return forecast.predict_step(gradient.attached, OmegaConf.merge(gradient.config, changed), 32).peak_mib

    return peak


@pytest.mark.parametrize("mib", [5.0, 7.5, 10.0, 17.0])
def test_no_other_bits_have_less_error_for_the_bytes(mib):
    costs = Costs({(0, "norm"): 1.0 * MIB, (1, "norm"): 1.0 * MIB, (1, "input"): 1.0 * MIB}, {})
    costs.error = {(0, "norm"): 0.1, (1, "norm"): 0.02, (1, "input"): 0.3}
    choices = tuple(range(1, 7))
    bits = costs.spread(mib, choices)
    assert sum(bits.values()) <= mib
    allowed = (c for c in itertools.product(choices, repeat=3) if sum(c) <= mib)
    best = min(costs.expected(dict(zip(costs.bytes, c, strict=True))) for c in allowed)
    assert costs.expected(bits) == pytest.approx(best)


def test_too_few_bytes_are_no_allocation():
    assert Costs({(0, "norm"): 10.0 * MIB}, {(0, "norm"): 0.1}).spread(19.9, (2, 4)) is None


def test_measured_costs_foretell_the_error_of_all_codes_together():
    gradient = gradient_of()
    costs = measure(gradient, bit_allocation.CODED)
    assert set(costs.bytes) == set(itertools.product((0, 1), ("pointwise", "norm", "attention")))
    assert all(0 < error < 0.5 for error in costs.error.values())
    for count in (3, 4, 6):
        bits = dict.fromkeys(costs.bytes, count)
        found = gradient.error(bit_allocation._applied(OmegaConf.to_object(gradient.config.quant), bits))
        assert found / 2.5 < costs.expected(bits) < 2.5 * found


def test_bytes_a_bit_are_those_of_the_prediction():
    gradient = gradient_of()
    costs = measure(gradient, ("norm", "input"))
    block = gradient.attached.backbone.blocks[0]
    assert costs.bytes[0, "input"] == 32 * math.prod(block.input.shape) / 8
    assert costs.bytes[0, "norm"] == pytest.approx(2 * costs.bytes[0, "input"], rel=0.01)  # two layers


def test_less_memory_costs_more_error_and_always_fits():
    gradient = gradient_of()
    peak = predicted(gradient)
    stock, errors = peak(REFERENCE), []
    for share in (1.0, 0.6, 0.3):
        gradient.config.quant.budget_mib = share * stock
        choice = allocate(gradient, peak)
        assert choice.peak_mib == peak(choice.quant) <= share * stock
        errors.append(choice.error)
    assert errors[0] == 0 and all(errors[1:]) and errors[-1] < 0.1


def test_every_budget_above_the_fewest_bits_fits_in_segments():
    """There the peak follows the bytes of one segment alone."""
    gradient = gradient_of("method=s2a", "method.segments=3", "backbone.kwargs.depth=6")
    peak, codes, asked = (
        predicted(gradient),
        measure(gradient, bit_allocation.CODED),
        OmegaConf.to_object(gradient.config.quant),
    )
    least, most = (
        peak(bit_allocation._applied(asked, dict.fromkeys(codes.bytes, bits)))
        for bits in (bit_allocation.BITS[0], bit_allocation.BITS[-1])
    )
    for part in (0.05, 0.2, 0.35, 0.5, 0.8):
        asked = replace(asked, budget_mib=least + part * (most - least))
        choice = bit_allocation._fit(asked, codes, bit_allocation.BITS, gradient, peak)
        assert choice and choice.peak_mib <= asked.budget_mib, part


def test_what_would_fit_is_said():
    gradient = gradient_of("quant.budget_mib=1.6")
    with pytest.raises(
        UserError, match=r"budget_mib=1.6: nothing fits; the smallest .* is [\d.]+ MiB; optim.micro_batch=\d+ would"
    ):
        allocate(gradient, predicted(gradient))
    gradient = gradient_of("quant.budget_mib=0.5")
    with pytest.raises(UserError, match="with one image at a time; method=side"):
        allocate(gradient, predicted(gradient))


def test_a_run_records_what_was_chosen(tmp_path, capsys):
    words = [
        *TINY,
        "method=bias",
        "quant=auto",
        "quant.budget_mib=2.5",
        "dataset.shots=4",
        "optim.epochs=1",
        "device=cpu",
    ]
    result, folder = trainer.train(compose([*words, f"run_dir={tmp_path}"]))
    assert "quant=auto: " in capsys.readouterr().out
    assert result["status"] == "ok" and result["memory"]["peak_mib"] <= 2.5
    assert result["allocation"]["name"] == "auto" and len(result["allocation"]["blocks"]) == 2
    assert result["config"]["quant"]["blocks"] == {} and json.loads((folder / "result.json").read_text())["allocation"]
    assert trainer.train(compose([*words, f"run_dir={tmp_path}"]), force=True)[0]["allocation"] == result["allocation"]


def test_a_budget_is_needed():
    with pytest.raises(UserError, match="quant=auto needs quant.budget_mib=N"):
        compose(["quant=auto"])
