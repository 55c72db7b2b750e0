"""Steps whose figures are read late, as on a GPU, give what those give that are read at once; and nothing else is
read.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli.common.errors import RunError
from s2a_cli.config.compose import compose
from s2a_cli.training import checkpoints, forecast, loop, trainer
from s2a_cli.training.pending import Pending

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *(
        "dataset=digits",
        "dataset.shots=8",
        "backbone=vit_micro",
        "method=bias",
        "quant=int4",
        "device=cpu",
        "workers=0",
    ),
    *("optim.epochs=2", "optim.batch_size=20", "backbone.kwargs.depth=2", "backbone.pretrained=false"),
]
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class Late(Pending):
    """On a CPU, and read as on a GPU."""

    def __init__(self, device, number, images):
        super().__init__(device, number, images)
        self.is_late = True

    def ends(self, loss):
        self.is_late = False
        super().ends(loss)
        self.is_late = True

    def read(self):
        self.is_late = False
        return super().read()


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch):
    monkeypatch.setattr(forecast, "predict", lambda run: None)


def train(folder, *words):
    return trainer.train(compose([*QUICK, f"run_dir={folder}", *words]))[0]


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines], (
        folder / checkpoints.FILE
    ).read_bytes()


def test_late_figures_are_the_same(tmp_path, monkeypatch):
    result = train(tmp_path / "at once")
    monkeypatch.setattr(loop, "Pending", Late)
    late = train(tmp_path / "late")
    assert outcome(tmp_path / "late") == outcome(tmp_path / "at once") and late["accuracy"] == result["accuracy"]
    train_one, count = loop.TrainLoop._train, [0]

    def stops(self, *args):
        train_one(self, *args)
        count[0] += 1
        return count[0] == 6, False  # in the second epoch

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "_train", stops)
        assert train(tmp_path / "broken")["status"] == "interrupted"
    sofar = checkpoints.load_state(tmp_path / "broken")["sofar"]
    assert sofar["step"] == 2 and sofar["images"] == 40 and len(sofar["rates"]) == 6
    train(tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "at once")


def test_a_loss_that_is_read_late_names_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Pending", Late)
    step, count = loop.Step.__call__, [0]

    def breaks(self, *args, **kwargs):
        count[0] += 1
        return step(self, *args, **kwargs) * (float("nan") if count[0] == 3 else 1.0)

    monkeypatch.setattr(loop.Step, "__call__", breaks)
    with pytest.raises(RunError, match="the loss is nan in epoch 1, step 3"):
        train(tmp_path)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device, apart from reads of these tensors, which live on the host."""

    def __init__(self, of_the_host):
        super().__init__()
        self.known, self.count = {x.data_ptr() for x in of_the_host}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS and args[0].data_ptr() not in self.known
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "words",
    [["method=bias"], ["method=s2a", "quant=tiny"], ["method=full", "quant=none"], ["method=side", "quant=none"]],
    ids=" ".join,
)
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, words):
    step, counts = loop.Step.__call__, []

    def watched(self, model, optimizer, *args, **kwargs):
        with Reads(state["step"] for state in optimizer.state.values()) as reads:
            loss = step(self, model, optimizer, *args, **kwargs)
        counts.append(reads.count)
        return loss

    monkeypatch.setattr(loop.Step, "__call__", watched)
    train(tmp_path, "optim.epochs=5", "optim.clip_grad=1", *words)
    assert len(counts) == 20 and not any(counts[17:]), counts  # codes are fitted to the steps of calibration.LOOKS
