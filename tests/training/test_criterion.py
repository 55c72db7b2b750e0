"""The loss against float64 by hand, its parts in micro-batches, and runs whose images have several labels."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from s2a_cli.cli.main import main
from s2a_cli.results.metrics import mean_average_precision
from s2a_cli.training import forecast
from s2a_cli.training.criterion import Criterion


def batch():
    torch.manual_seed(0)
    return torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,)), torch.randint(2, (8, 5)).double()


def test_the_losses_are_those_of_their_definitions():
    logits, labels, several = batch()
    weights = torch.rand(5, dtype=torch.float64) + 0.5
    assert torch.equal(
        Criterion(label_smoothing=0.1)(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    by_hand = -(weights[labels] * logits.log_softmax(1)[range(8), labels]).mean()
    torch.testing.assert_close(Criterion(weights=weights)(logits, labels), by_hand)
    shares = F.one_hot(labels, 5).double() * 0.7 + 0.06  # as mixup makes them
    torch.testing.assert_close(
        Criterion(weights=weights)(logits, shares), -(weights * shares * logits.log_softmax(1)).sum(1).mean()
    )
    for smoothing in (0.0, 0.2):
        targets = several * (1 - smoothing) + smoothing / 2
        terms = weights * targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)
        torch.testing.assert_close(Criterion(True, smoothing, weights)(logits, several), -terms.mean())


@pytest.mark.parametrize("criterion", [Criterion(weights=torch.rand(5).double()), Criterion(True)])
def test_micro_batches_add_up(criterion):
    logits, labels, several = batch()
    targets = several if criterion.multi_label else labels
    parts = [criterion(logits[at], targets[at]) * len(logits[at]) / 8 for at in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(parts), criterion(logits, targets))


def test_mean_average_precision():
    scores = np.array([[0.9, 0.1, 0.3], [0.8, 0.7, 0.2], [0.7, 0.6, 0.1], [0.6, 0.5, 0.4]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    # class 0: hits at ranks 1 and 3; class 1: at ranks 1 and 3; class 2 has no image
    assert mean_average_precision(scores, targets) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert mean_average_precision(scores, targets * 0) is None


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A table of 60 images of 16 x 16 pixels that are red, green, both or neither; red ones are rare."""
    folder, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    with (folder / "colours.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "red", "green", "kind"])
        for index in range(60):
            red, green = index % 4 == 0, index % 2 == 0
            pixels = draw.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., 0] += np.uint8(150 * red)
            pixels[..., 1] += np.uint8(150 * green)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            lines.writerow([f"{index}.png", int(red), int(green), "rare" if red else "plain"])
    return folder / "colours.csv"


def trained(shapes, folder, *words, monkeypatch):
    monkeypatch.setattr(forecast, "predict", lambda run: None)
    monkeypatch.setenv("S2A_DATA", str(shapes.parent / "cache"))
    base = ["dataset=table", f"dataset.file={shapes}", "backbone=vit_micro", "device=cpu", "workers=0", "quant=none"]
    base += ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=16", f"run_dir={folder}"]
    assert main(["train", *base, *words]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), lines


SEVERAL = ["dataset.class_columns=[red,green]", "dataset.scale=null"]


@pytest.mark.parametrize(
    "words",
    [
        ["method=s2a", "quant=int4", "method.segments=2", "optim.mixup=0.2", "optim.micro_batch=5"],
        ["method=side", "dataset.cache=features", "optim.balance=sampler"],
    ],
    ids=lambda words: "-".join(words),
)
def test_several_labels_are_trained_and_told_by_mean_average_precision(shapes, tmp_path, words, monkeypatch, capsys):
    run, lines = trained(shapes, tmp_path / "run", *SEVERAL, *words, monkeypatch=monkeypatch)
    accuracy = run["accuracy"]
    assert accuracy["test_top1"] is None and 0 < accuracy["test_map"] <= 100
    assert accuracy["val_map"] == max(line["val_map"] for line in lines) and "val_top1" not in lines[0]
    said = capsys.readouterr()
    assert "mAP %" in said.out and "several labels an image" in said.out and "val mAP" in said.err
    assert main(["eval", f"run={tmp_path / 'run'}"]) == 0
    assert f"test_map: {accuracy['test_map']} %" in capsys.readouterr().out
