"""A first config for somebody's photos."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from s2a_cli import data
from s2a_cli.cli.main import main
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import words_of_file
from s2a_cli.planner import starting
from s2a_cli.training import duration

pytestmark = pytest.mark.predicts


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S2A_DATA", str(tmp_path / "cache"))
    for name in ("my cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (300, 240 + number), (number, 9 * number, 90)).save(
                tmp_path / f"photos/{name}/{number}.png"
            )
    return tmp_path / "photos"


@pytest.fixture
def pace(monkeypatch):
    """Says how many seconds ViT-Ti at 112 px takes for an image."""
    asked = []

    def set_to(seconds):
        def measure(run):
            asked.append((run.config.backbone.name, run.backbone.image.size, run.config.backbone.pretrained))
            return duration.Pace(0.0, seconds, seconds / 3, 8)

        monkeypatch.setattr(duration, "measure", measure)
        return asked

    return set_to


@pytest.mark.parametrize(
    ("seconds", "chosen", "epochs"),
    [(1e-4, ["backbone=vit_b"], "40"), (0.6, ["backbone=vit_t"], "40"), (2.0, ["backbone=vit_t", starting.SMALL], "40"),
     (20.0, ["backbone=vit_t", starting.SMALL], "11")],
)  # fmt: skip
def test_the_most_accurate_choice_that_is_done_in_time(photos, pace, seconds, chosen, epochs):
    asked = pace(seconds)
    begun = starting.start("photos", ["device=cpu"], 50.0)
    assert asked == [("vit_t", 112, False)]
    size = [] if starting.SMALL in chosen else ["backbone.image_size=224"]
    assert [word for word in begun.words if word.startswith("backbone")] == [*chosen, *size]
    assert begun.settings["optim.epochs"][0] == epochs
    took = duration.total(
        duration.Pace(0.0, seconds, seconds / 3, 8), data.load(compose(begun.words).dataset), 12 * int(epochs)
    )
    assert took <= 50 * 60 or chosen == ["backbone=vit_b"]


def test_the_file_is_what_the_command_line_says(photos, pace, capsys):
    pace(0.01)
    (photos.parent / 'odd "name" #1, é').symlink_to(photos)
    words = ['odd "name" #1, é', "device=cpu", "backbone=vit_micro", "optim.lr=1e-3", "out=my.yaml"]
    words.append("+backbone.kwargs.depth=2")
    assert main(["init", *words]) == 0
    said = capsys.readouterr().out
    assert "12 photos to train on" in said and "shorter sides of 240 to 249 px" in said
    assert "predicted peak of memory" in said and "s2a train config=my.yaml" in said
    config = compose(words_of_file(photos.parent / "my.yaml"))
    assert config.dataset.root == 'odd "name" #1, é' and config.optim.lr == 1e-3
    assert config.backbone.name == "vit_micro" and config.method.name == "s2a" and config.backbone.kwargs.depth == 2
    text = (photos.parent / "my.yaml").read_text()
    assert config.backbone.image_size == 16 and "\n# budget: " in text
    lines = [line.replace("# budget:", "budget:") for line in text.splitlines() if not line.startswith("quant:")]
    (photos.parent / "less.yaml").write_text("\n".join(lines))
    assert compose(words_of_file(photos.parent / "less.yaml")).budget
    assert main(["validate", "config=my.yaml", "optim.epochs=3"]) == 0
    assert "optim.epochs=3" in capsys.readouterr().out


def test_a_budget_that_is_given_takes_the_place_of_quant(photos, pace, capsys):
    pace(0.01)
    assert main(["init", "photos", "device=cpu", "backbone=vit_micro", "budget=100MiB", "out=my.yaml"]) == 0
    assert "how to train in 100MiB is planned before the first step" in capsys.readouterr().out
    config = compose(words_of_file(photos.parent / "my.yaml"))
    assert config.budget == "100MiB" and "quant:" not in (photos.parent / "my.yaml").read_text()


def test_a_gpu_gets_a_budget_of_what_is_free(photos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 12 * 2**30))
    begun = starting.start("photos", ["backbone=vit_micro"], 20.0)
    config = compose(words_of_file(written(photos, begun)))
    assert (config.budget, config.backbone.image_size, config.optim.batch_size) == ("9216MiB", 16, 64)
    assert "this GPU has 12,288 MiB" in begun.found[-1]
    monkeypatch.setattr(starting, "largest_batch", lambda config, size: 7)
    without = starting.start("photos", ["backbone=vit_micro", "quant=int4"], 20.0)
    assert "budget" not in without.settings and without.settings["optim.batch_size"][0] == "7"


def written(photos, begun):
    path = photos.parent / "a.yaml"
    path.write_text(begun.text(path))
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init"], "expected one folder of photos"),
        (["init", "photos", "minuts=5", "out=mine.yaml"], "minuts: no such word; s2a init takes out=, minutes= and"),
        (["init", "photos", "minutes=soon"], "minutes=soon: expected a number above 0"),
        (["init", "photos", "out=mine.yaml"], "out=mine.yaml: is there already"),
        (["init", "photos", "out=no/a.yaml"], "there is no folder no"),
        (["init", "nowhere"], "dataset.root=nowhere does not exist"),
        (["init", "photos", "backbne=vit_t"], "did you mean 'backbone'"),
        (["validate", "config=none.yaml"], "can't be read (No such file or directory)"),
        (["validate", "config=mine.yaml"], "expected lines of `key: value`"),
        (["validate", "config=broken.yaml"], "config=broken.yaml: can't be read"),
    ],
)
def test_what_is_no_beginning(photos, capsys, words, said):
    (photos.parent / "mine.yaml").write_text("a text")
    (photos.parent / "broken.yaml").write_text("a: [1")
    before = sorted(photos.parent.iterdir())
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path for path in sorted(photos.parent.iterdir()) if path.name != "cache"] == before
