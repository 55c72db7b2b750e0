"""A finished run as plain weights that timm loads without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.methods import Attachment
from s2a_cli.training import export, forecast, trainer
from s2a_cli.training.run import prepare

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    "dataset=digits", "dataset.shots=4", "backbone=vit_micro", "optim.epochs=1", "optim.batch_size=16", "device=cpu",
]  # fmt: skip
ALONE = """
import sys, timm, torch
assert not any(name.startswith("s2a") for name in sys.modules)
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch):
    memory = trainer.memory.Memory("predicted", 2.0, 1.0, 0.5, None, 4.0, "predicted")
    monkeypatch.setattr(forecast, "predict", lambda run: memory.as_dict())


def trained(folder, *words):
    trainer.train(compose([*QUICK, f"run_dir={folder}", *words]))
    return folder


def test_timm_loads_what_was_trained(tmp_path, capsys):
    run = trained(tmp_path / "run", "method=bias")
    out = tmp_path / "here" / "model"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    assert "plain weights" in capsys.readouterr().out
    config = OmegaConf.load(run / "config.yaml")
    model = prepare(compose([*QUICK, "method=bias"])).model
    images = torch.randn(3, 3, config.backbone.image_size, config.backbone.image_size)
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", ALONE, out, tmp_path / "images.pt", tmp_path / "logits.pt"], check=True)
    with torch.no_grad():
        assert not torch.allclose(torch.load(tmp_path / "logits.pt"), model.eval()(images))  # it was trained
    described = json.loads((out / "config.json").read_text())
    assert described["label_names"] == json.loads((run / "result.json").read_text())["data"]["classes"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("words", [["backbone.weights=int8"], ["backbone.weights=offload"], ["precision=bf16"]])
def test_weights_in_fewer_bits_become_those_that_were_computed_with(tmp_path, words):
    run = trained(tmp_path / "run", "method=bias", *words)
    for more in ([], ["--force"]):
        assert main(["export", f"run={run}", f"out={tmp_path / 'model'}", *more]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_what_cannot_be_exported_leaves_nothing(tmp_path, capsys):
    run = trained(tmp_path / "run", "method=prompt")
    assert main(["export", f"run={run}", f"out={tmp_path / 'model'}"]) == 2
    assert "no weight of the backbone can hold it" in capsys.readouterr().err
    assert main(["export", f"run={run}"]) == 2
    assert "out=FOLDER is needed once" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    for words, said in (((), "is there already"), (("--force",), "holds photo.jpg")):
        assert main(["export", f"run={run}", f"out={tmp_path / 'mine'}", *words]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_a_model_that_differs_is_refused(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "method=linear")
    monkeypatch.setattr(Attachment, "merge", lambda self: broken(self.model))
    with pytest.raises(UserError, match="differ from the run's"):
        export.export(OmegaConf.load(run / "config.yaml"), run, tmp_path / "model")
    assert not (tmp_path / "model").exists() and len(list(tmp_path.iterdir())) == 1


def broken(model):
    """The model with one tensor changed."""
    with torch.no_grad():
        list(model.parameters())[-1].add_(1.0)  # the head's bias
    return model
