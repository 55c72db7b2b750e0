"""The embedded backbone: its weights fit its config, they transfer to digits, and the script that makes them runs."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
CONF = OmegaConf.load(ROOT / "conf" / "backbone" / "vit_micro.yaml")
WEIGHTS = ROOT / "s2a_cli" / "weights" / "vit_micro.safetensors"
SCRIPT = ROOT / "scripts" / "pretrain_vit_micro.py"


def backbone(pretrained: bool) -> nn.Module:
    """Returns the model without a head, from images [B, 3, 16, 16] to features [B, 96]."""
    torch.manual_seed(0)
    model = timm.create_model(CONF.timm, pretrained=False, num_classes=0, **CONF.kwargs).eval()
    if pretrained:
        model.load_state_dict(load_file(WEIGHTS), strict=True)
    return model


@torch.no_grad()
def digit_features(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images[:count]).float()[:, None] / 16
    images = F.interpolate(images, size=(CONF.image_size, CONF.image_size), mode=CONF.interpolation)
    images = (images.expand(-1, 3, -1, -1) - CONF.mean[0]) / CONF.std[0]
    return F.normalize(model(images)), torch.from_numpy(digits.target[:count])


def neighbours_accuracy(model: nn.Module) -> float:
    """Returns the share of 400 digits whose nearest of 400 others has the same label."""
    features, labels = digit_features(model, 800)
    nearest = (features[400:] @ features[:400].T).argmax(1)
    return (labels[nearest] == labels[400:]).float().mean().item()


def test_weights_are_small_and_fit_the_config():
    assert WEIGHTS.stat().st_size <= 3e6
    model = backbone(pretrained=True)  # strict: raises on a missing or unexpected key
    assert sum(p.numel() for p in model.parameters()) <= 1e6
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_features_separate_digits_that_were_never_seen():
    trained, untrained = neighbours_accuracy(backbone(pretrained=True)), neighbours_accuracy(backbone(pretrained=False))
    assert trained > 0.75
    assert trained > untrained + 0.3


def test_metadata_names_classes_without_digits():
    with safetensors.safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    classes = metadata["data"].partition("no digits: ")[2]
    assert len(classes) > 30
    for character in classes:
        parts = unicodedata.normalize("NFKD", character)
        assert all(unicodedata.numeric(part, None) is None for part in parts), character
    assert float(metadata["held_out_top1"].split()[0]) > 50


def test_no_class_looks_like_a_digit(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib's fonts are the pretraining data")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import pretrain_vit_micro as script

    classes, images, labels, held_out = script.glyphs(limit=12)
    assert len(classes) == 12 and labels.max() == 11
    assert images.shape == (len(labels), script.CANVAS, script.CANVAS) and 0 < held_out.sum() < len(labels)
    digits = [script.signature(script.Face("DejaVuSans").render(digit)[None]) for digit in "0123456789"]
    for label in range(12):
        mark = script.signature(images[labels == label])
        assert max(mark @ digit for digit in digits) < 0.9
    assert not set(classes) & set(script.LOOKALIKES)


@pytest.mark.slow
def test_script_runs_end_to_end_and_repeats(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib's fonts are the pretraining data")
    written = []
    for name in ("a.safetensors", "b.safetensors"):
        tiny = ["--classes", "8", "--steps", "4", "--batch-size", "16"]
        command = [sys.executable, SCRIPT, "--out", tmp_path / name, *tiny]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "images/s" in done.stdout and "top-1" in done.stdout
        written.append(load_file(tmp_path / name))
    backbone(pretrained=False).load_state_dict(written[0], strict=True)
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
