"""A finished run in forms that others load without this package."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.methods import Attachment
from s2a_cli.results.export_files import SUFFIXES
from s2a_cli.training import export, forecast, trainer
from s2a_cli.training.export_formats import FORMATS, quiet
from s2a_cli.training.run import build
from s2a_cli.training.trained import load

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    "dataset=digits", "dataset.shots=4", "backbone=vit_micro", "optim.epochs=1", "optim.batch_size=16", "device=cpu",
    "backbone.kwargs.depth=2", "backbone.pretrained=false",
]  # fmt: skip
ALONE = """
import sys, torch
path, images = sys.argv[1], torch.load(sys.argv[2])
if path.endswith(".pt"):
    logits = torch.jit.load(path)(images)
elif path.endswith(".pt2"):
    logits = torch.export.load(path).module()(images)
else:
    import timm
    logits = timm.create_model("local-dir:" + path, pretrained=True).eval()(images)
assert not any(name.startswith("s2a") for name in sys.modules)
torch.save(logits.detach(), sys.argv[3])
"""


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch):
    memory = trainer.memory.Memory("predicted", 2.0, 1.0, 0.5, None, 4.0, "predicted")
    monkeypatch.setattr(forecast, "predict", lambda run: memory.as_dict())


def trained(folder, *words):
    trainer.train(compose([*QUICK, f"run_dir={folder}", *words]))
    return folder


def agrees_alone(run, path, place):
    """Whether a process without this package gets the run's logits, of another number of images than it was made of."""
    again = load(run, ["device=cpu"])
    size = again.attached.backbone.image.size
    images = torch.randn(5, 3, size, size)
    torch.save(images, place / "images.pt")
    call = [sys.executable, "-c", ALONE, path, place / "images.pt", place / "logits.pt"]
    subprocess.run(call, check=True)
    logits, expected = torch.load(place / "logits.pt"), again(images)
    return (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_timm_loads_what_was_trained(tmp_path, capsys):
    run = trained(tmp_path / "run", "method=bias")
    out = tmp_path / "here" / "model"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    assert "its logits on 8 photos differ from the run's by at most" in capsys.readouterr().out
    assert agrees_alone(run, out, tmp_path)
    described = json.loads((out / "config.json").read_text())
    assert described["label_names"] == json.loads((run / "result.json").read_text())["data"]["classes"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("to", ["torchscript", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_side_branch_is_a_part_of_the_graph(finished, tmp_path, to):
    """The voting heads' logits are those of the evaluation, for a batch of any size."""
    out = tmp_path / f"model{SUFFIXES[to]}"
    assert main(["export", f"run={finished[0]}", f"out={out}", f"to={to}"]) == 0
    assert agrees_alone(finished[0], out, tmp_path)
    about = json.loads((tmp_path / f"{out.name}.json").read_text())
    assert about["label_names"] == finished[1]["data"]["classes"] and about["preprocessing"]["center_crop"] == 16


@pytest.mark.parametrize("method", ["vpt_shallow", "mona", "s2a_paper"])
def test_graphs_of_other_structures_take_a_batch_of_any_size(method, tmp_path):
    attached, _ = build(compose(["backbone=vit_micro", f"method={method}"]), 3)
    model, images = attached.model.eval(), torch.randn(5, 3, 16, 16)
    with torch.no_grad(), quiet():
        FORMATS["torchscript"].write(model, images, tmp_path / "a.pt", {})
        torch.testing.assert_close(FORMATS["torchscript"].load(tmp_path / "a.pt")(images), model(images))


def test_the_card_says_what_it_is_and_not_where_it_was(finished, tmp_path, capsys):
    out = tmp_path / "model.pt"
    assert main(["export", f"run={finished[0]}", f"out={out}", "to=torchscript"]) == 0
    card = (tmp_path / "model.pt.md").read_text()
    assert (
        "`int(resize_shorter_side * longer / shorter)` px" in card and "`int(round((width - center_crop) / 2))`" in card
    )
    front = yaml.safe_load(card.split("---")[1])
    accuracy = finished[1]["accuracy"]["test_top1"]
    file = Path(export.__file__).parents[1] / "weights" / "vit_micro.safetensors"
    of_weights = f"vit_micro.safetensors (SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()})"
    about = json.loads((tmp_path / "model.pt.json").read_text())
    assert (about["weights"], about["license"]) == (of_weights, "other") and front["license"] == "other"
    assert f"`{of_weights}`, from a file of the user; licence of the file's origin, which is not known here" in card
    assert front["library_name"] == "timm" and f"test top-1 {accuracy:.2f} % (95 % interval" in card
    assert "licence" in card and 'torch.jit.load("model.pt")' in card and str(finished[0]) not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.pt.json", "model.pt.md"]


@pytest.mark.parametrize("words", [["backbone.weights=int8"], ["precision=bf16"]])
def test_weights_in_fewer_bits_become_those_that_were_computed_with(tmp_path, words):
    run = trained(tmp_path / "run", "method=bias", *words)
    for more in ([], ["--force"]):
        assert main(["export", f"run={run}", f"out={tmp_path / 'model'}", *more]) == 0
    assert main(["export", f"run={run}", f"out={tmp_path / 'a.safetensors'}", "to=safetensors"]) == 0
    named = ["a.safetensors", "a.safetensors.json", "a.safetensors.md", "model", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == named


def test_what_cannot_be_exported_leaves_nothing(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    (tmp_path / "a.pt").touch()
    (tmp_path / "a").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for words, said in (
        (["out=model"], "to=onnx or to=torchscript or to=torch-export write it as a part of the graph"),
        ([], "out=PATH is needed"),
        (["out=model", "to=onxx"], "did you mean 'onnx'"),
        (["out=model.onnx", "to=onnx"], "to=onnx needs onnx and onnxscript and onnxruntime: pip install 's2a[onnx]'"),
        (["out=model.onnx"], "add to=onnx"),
        (["out=model", "to=torchscript"], "ends in .pt"),
        (["out=a.pt", "to=torchscript"], "is there already"),
        (["out=mine"], "holds photo.jpg"),
        (["out=mine", "--force"], "holds photo.jpg"),
        (["out=a", "--force"], "out=a: is a file; to=timm makes a folder"),
        (["out=c.pt", "to=torchscript", "--force=false"], "--force=false: --force takes no value"),
        (["out=b.pt", "to=torchscript", "images=mine/photo.jpg"], "no photo to check on"),
        (["out=b.pt", "to=torchscript", "dataset.split_seed=2"], "or on those that images=FOLDER names"),
    ):
        assert main(["export", f"run={finished[0]}", *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.pt", "mine"]


@pytest.mark.parametrize("away", [True, False], ids=["as the earlier one goes", "as the new one comes"])
def test_an_export_that_can_not_be_moved_leaves_the_earlier_one(tmp_path, monkeypatch, capsys, away):
    run, out = trained(tmp_path / "run", "method=bias"), tmp_path / "model"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    before, move = {path.name: path.read_bytes() for path in out.iterdir()}, Path.rename

    def rename(path, target):
        if Path(target) == out and path.name == out.name:
            raise KeyboardInterrupt
        moved = move(path, target)
        if path == out and away:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    assert main(["export", f"run={run}", f"out={out}", "--force"]) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


@pytest.mark.parametrize("to", ["torchscript", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_graph_is_checked_on_one_photo(finished, tmp_path, to, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "one.png")
    out = tmp_path / f"model{SUFFIXES[to]}"
    assert main(["export", f"run={finished[0]}", f"out={out}", f"to={to}", f"images={tmp_path / 'one.png'}"]) == 0
    assert "its logits on 1 photo " in capsys.readouterr().out and agrees_alone(finished[0], out, tmp_path)


@pytest.mark.parametrize("to", ["torchscript", "timm"])
def test_a_full_disk_is_said_in_a_line(finished, tmp_path, to, capsys, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    run = trained(tmp_path / "run", "method=bias")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["export", f"run={run}", f"out={tmp_path / 'model'}{SUFFIXES[to]}", f"to={to}"]) == 2
    assert "export: can't be written (No space left on device)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_differs_is_refused(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "method=linear")
    monkeypatch.setattr(Attachment, "merge", lambda self: broken(self.model))
    with pytest.raises(UserError, match="differ from the run's"):
        export.export(load(run).config, run, tmp_path / "model")
    assert not (tmp_path / "model").exists() and len(list(tmp_path.iterdir())) == 1


def broken(model):
    """The model with one tensor changed."""
    with torch.no_grad():
        list(model.parameters())[-1].add_(1.0)  # the head's bias
    return model
