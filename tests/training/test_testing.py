"""A finished run tested again, and on other labelled photos."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from s2a_cli.cli.main import main
from s2a_cli.config.compose import compose
from s2a_cli.results import evaluation
from s2a_cli.results.evaluation import Answers, Evaluation
from s2a_cli.training import forecast, trainer

TRAIN = ["backbone=vit_micro", "dataset=folder", "method=linear", "optim.epochs=1", "device=cpu", "workers=0"]


def draw(folder, each=6, classes=("dark", "grey", "light")):
    """Writes photos of plain colours, a folder a class."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (16, 16), (80 * place + 40 + number,) * 3).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run on photos, of which one was damaged; and the photos."""
    folder = tmp_path_factory.mktemp("drawn")
    photos = draw(folder / "photos")
    whole = (photos / "grey" / "0.png").read_bytes()
    (photos / "grey" / "0.png").write_bytes(whole[:50])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "predict", lambda run: None)
        patch.setenv("S2A_DATA", str(folder / "cache"))
        words = [*TRAIN, f"dataset.root={photos}", "dataset.on_corrupt=skip", f"run_dir={folder / 'run'}"]
        trainer.train(compose(words))
    return SimpleNamespace(run=folder / "run", photos=photos, whole=whole)


@pytest.fixture
def copied(drawn, tmp_path, monkeypatch):
    """A copy of that run and its photos, and a function that tests it: words -> (exit code, out, error, figures)."""
    monkeypatch.setenv("S2A_DATA", str(tmp_path / "cache"))
    run, photos = shutil.copytree(drawn.run, tmp_path / "run"), shutil.copytree(drawn.photos, tmp_path / "photos")
    return SimpleNamespace(run=run, photos=photos, whole=drawn.whole)


def evaluated(copied, capsys, *words):
    data = [] if words else [f"dataset.root={copied.photos}"]
    code = main(["eval", f"run={copied.run}", "workers=0", *data, *words])
    said = capsys.readouterr()
    found = sorted(copied.run.glob("evaluation*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    return code, said.out, said.err, json.loads(found[-1].read_text()) if found else None


def test_the_same_figures_come_out_to_the_last_digit(copied, capsys):
    code, said, _, figures = evaluated(copied, capsys)
    recorded = json.loads((copied.run / "result.json").read_text())
    assert code == 0 and "equal" in said and figures["top1"] == recorded["accuracy"]["test_top1"]
    assert {path.name for path in (copied.run / "evaluation").iterdir()} == {*evaluation.FILES}
    recorded["accuracy"]["test_top1"] = 12.0
    (copied.run / "result.json").write_text(json.dumps(recorded))
    code, said, _, _ = evaluated(copied, capsys)
    assert code == 1 and "recorded 12.0 %: NOT EQUAL" in said


def test_a_photo_that_was_repaired_or_removed_changes_no_other(copied, capsys):
    """The test split stays the one that it was, not one that the new number of photos would draw."""
    before = evaluated(copied, capsys)[3]
    (copied.photos / "grey" / "0.png").write_bytes(copied.whole)
    for number in range(4):
        shutil.copy(copied.photos / "dark" / "1.png", copied.photos / "dark" / f"new{number}.png")
    code, said, error, figures = evaluated(copied, capsys)
    assert code == 0 and "the data has changed since the training" in said, error
    assert figures["top1"] == before["top1"] and figures["images"] == before["images"]
    (gone,) = json.loads((copied.run / "test_files.json").read_text())[:1]
    (copied.photos / gone).unlink()
    code, said, _, figures = evaluated(copied, capsys)
    assert code == 0 and f"1 image of it can't be read or is gone: {gone}" in said
    assert figures["images"] == before["images"] - 1
    (copied.run / "test_files.json").unlink()
    assert "which images it was tested on is not known" in evaluated(copied, capsys)[2]


def test_a_damaged_photo_stops_no_test(copied, capsys):
    before = evaluated(copied, capsys)[3]
    stored = json.loads((copied.run / "result.json").read_text())
    stored["config"]["dataset"]["on_corrupt"] = "stop"
    (copied.run / "result.json").write_text(json.dumps(stored))
    (copied.photos / "grey" / "junk.png").write_bytes(b"no photo")
    code, _, error, figures = evaluated(copied, capsys)
    assert code == 0 and figures["top1"] == before["top1"] and figures["images"] == before["images"], error
    tested = json.loads((copied.run / "test_files.json").read_text())[0]
    (copied.photos / tested).write_bytes(b"no photo")
    code, said, _, figures = evaluated(copied, capsys)
    assert code == 0 and f"1 image of it can't be read or is gone: {tested}" in said
    assert figures["images"] == before["images"] - 1


def test_other_photos_of_its_classes(copied, tmp_path, capsys):
    other = draw(tmp_path / "other", 3, ("light", "dark"))
    (other / "dark" / "0.png").rename(other / "dark" / os.fsdecode(b"\xe9.png"))  # a name that is not UTF-8
    code, said, _, figures = evaluated(copied, capsys, f"data={other}")
    assert code == 0 and figures["images"] == 6 and "2 of the run's 3 classes occur" in said
    assert [row["images"] for row in figures["by_class"]] == [3, 0, 3]
    (made,) = copied.run.glob("evaluation-other-*")
    answers = (made / "answers.csv").read_text().splitlines()
    assert "dark/\\udce9.png" in "".join(answers)
    assert len(answers) == 7 and {line.split(",")[1] for line in answers[1:]} == {"light", "dark"}
    alone = draw(tmp_path / "alone", 2, ("grey",))
    assert evaluated(copied, capsys, f"data={alone}")[3]["classes_tested"] == 1
    unknown = draw(tmp_path / "unknown", 2, ("light", "lihgt"))
    code, _, error, _ = evaluated(copied, capsys, f"data={unknown}")
    assert code == 2 and "has lihgt, which the run was not trained on" in error and error.count("\n") == 1


def test_two_folders_of_one_name_are_two_evaluations(copied, tmp_path, capsys):
    """The second took the place of the first, as did one whose name differs in letters that are not ASCII."""
    draw(tmp_path / "a" / "été", 2, ("light", "dark"))
    draw(tmp_path / "b" / "été", 1, ("light", "dark"))
    for parent in ("a", "b", "a"):
        assert evaluated(copied, capsys, f"data={tmp_path / parent / 'été'}")[0] == 0
    made = sorted(copied.run.glob("evaluation-été-*/evaluation.json"))
    assert sorted(json.loads(path.read_text())["images"] for path in made) == [2, 4]


def test_words_that_cannot_be_tested(copied, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for words, said in (
        ([f"data={copied.photos}", "dataset=digits"], "both name the data to test on"),
        ([f"data={copied.photos}", f"out={tmp_path / 'mine'}"], "holds letter.txt"),
        ([f"data={tmp_path / 'none'}"], "does not exist"),
        (["dataset=digits"], "which the run was not trained on"),
        (["dataset.split_seed=3"], "another split could hold images that it was trained on"),
    ):
        code, _, error, _ = evaluated(copied, capsys, *words)
        assert code == 2 and said in error, error


def figures(targets, predicted, confidence, classes=3):
    answers = Answers(list("abcdefgh")[: len(targets)], *map(np.array, (targets, predicted, confidence)), None, 0.5)
    return Evaluation("run", "0" * 12, "data", list("xyz")[:classes], answers, []).figures()


def test_the_figures_are_those_of_their_definitions():
    found = figures([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], [0.99, 0.97, 0.95, 0.35, 0.5, 0.38])
    assert found["top1"] == pytest.approx(400 / 6) and found["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found["balanced"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2) and found["classes_tested"] == 2
    assert found["macro_f1"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
    # bins of 1/15: three right at 0.97 on average, two wrong at 0.365, one right at 0.5
    expected = (3 * abs(1 - 0.97) + 2 * 0.365 + abs(1 - 0.5)) / 6
    assert found["expected_calibration_error_15_bins"] == pytest.approx(100 * expected)
    assert [one["images"] for one in found["calibration"]] == [2, 1, 3]
    assert found["by_class"][2] == {"class": "z", "images": 0, "recall": None, "precision": None, "f1": None}


def test_the_interval_is_wilsons():
    """(8 of 10): Wilson 1927, as in Brown, Cai, DasGupta 2001."""
    z, n, p = 1.959963984540054, 10, 0.8
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert evaluation.wilson(8, 10) == pytest.approx(expected)
    assert evaluation.wilson(10, 10)[1] == pytest.approx(100) and evaluation.wilson(0, 10)[0] == pytest.approx(0)
