"""The way of a new user, from a folder of photos to models for others: docs/photos.md shows it on real photos."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import s2a_cli
from s2a_cli.cli.main import main
from s2a_cli.training import loop

ALONE = """
import glob, json, sys
import numpy as np, onnxruntime, timm, torch
from PIL import Image
how = json.load(open("flowers.onnx.json"))["preprocessing"]
def prepared(path):
    image = Image.open(path).convert("RGB")
    known = how | {"longer": max(image.size), "shorter": min(image.size)}
    sides = {min(image.size): how["resize_shorter_side"], max(image.size): eval(how["resize_longer_side"], known)}
    image = image.resize([sides[side] for side in image.size], Image.Resampling[how["interpolation"].upper()])
    known |= {"width": image.width, "height": image.height}
    left, top, size = eval(how["crop_left"], known), eval(how["crop_top"], known), how["center_crop"]
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((pixels - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)
images = np.stack([prepared(path) for path in sorted(glob.glob("uneven/*.png"))])
session = onnxruntime.InferenceSession("flowers.onnx")
graph = session.run(["logits"], {"images": images})[0]
model = timm.create_model("local-dir:plain", pretrained=True).eval()
with torch.no_grad():
    plain = model(torch.from_numpy(images)).numpy()
assert not any(name.startswith("s2a") for name in sys.modules)
np.savez("alone.npz", images=images, graph=graph, plain=plain)
"""
UNEVEN = ((37, 23), (23, 37), (41, 29), (37, 28), (53, 31), (101, 47))  # sides whose ratio no resized side keeps


def draw(folder, names, each, first=0):
    """Writes photos that two features tell apart, a folder a class."""
    noise = np.random.default_rng(first)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(first, first + each):
            pixels = noise.integers(0, 60, (24, 30, 3)) + np.array(names[name])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


@pytest.mark.slow
@pytest.mark.predicts
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="pip install 's2a[onnx]'")
def test_from_photos_to_models_for_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S2A_DATA", str(tmp_path / "cache"))
    draw(tmp_path / "flowers", {"rose": (180, 20, 40), "bluebell": (30, 40, 190), "daisy": (170, 170, 150)}, 12)
    draw(tmp_path / "garden", {"rose": (180, 20, 40), "daisy": (170, 170, 150)}, 4, first=50)
    (tmp_path / "new").mkdir()
    for number, color in enumerate(["red", "white"]):
        Image.new("RGB", (40, 30), color).save(tmp_path / "new" / f"{number}.png")
    (tmp_path / "uneven").mkdir()
    for number, size in enumerate(UNEVEN):
        noise = np.random.default_rng(number).integers(0, 256, (*reversed(size), 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "uneven" / f"{number}.png")
    (tmp_path / "new" / "cut.png").write_bytes((tmp_path / "new" / "0.png").read_bytes()[:40])

    def said(*words, code=0):
        found = main(list(words))
        output = capsys.readouterr()
        assert found == code, output.err
        return output.out + output.err

    text = said("init", "flowers", "backbone=vit_micro", "device=cpu", "workers=0", "optim.epochs=6")
    assert "s2a train config=photos.yaml" in text
    train = ("train", "config=photos.yaml", "run_dir=run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_factor", interrupting(loop.lr_factor))
        assert "the same line goes on from there" in said(*train, code=130)
    assert "time: about" in said(*train) and json.loads((tmp_path / "run/result.json").read_text())["status"] == "ok"
    said("report", "run=run")
    assert "cut.png: can't be read" in said(
        "predict", "run=run", "images=new", "out=new.csv", "gallery=new.html", code=1
    )
    rows = list(csv.DictReader((tmp_path / "new.csv").read_text().splitlines()))
    assert rows[0]["class"] == "rose" and len(rows) == 3
    assert "test_top1: " in said("eval", "run=run")
    assert "2 of the run's 3 classes occur" in said("eval", "run=run", "data=garden")
    assert "to=onnx" in said("export", "run=run", "out=plain", code=2)
    said("export", "run=run", "out=flowers.onnx", "to=onnx")
    said("train", "config=photos.yaml", "method=bias", "optim.epochs=1", "run_dir=bias")
    said("export", "run=bias", "out=plain")

    subprocess.run([sys.executable, "-c", ALONE], check=True)
    alone, places = np.load("alone.npz"), sorted((tmp_path / "uneven").iterdir())
    for run, key in (("run", "graph"), ("bias", "plain")):
        trained = s2a_cli.load(run, ["device=cpu"])
        expected = trained(torch.stack([trained.transform(Image.open(path)) for path in places])).numpy()
        assert abs(alone[key] - expected).max() <= 1e-4 * abs(expected).max()


def interrupting(lr_factor):
    """A schedule that is broken off in its fifth step, as by Ctrl-C."""

    def factor_of(*arguments):
        factor = lr_factor(*arguments)

        def broken(step):
            if step == 5:
                raise KeyboardInterrupt
            return factor(step)

        return broken

    return factor_of
