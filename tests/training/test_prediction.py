"""Photos classified by a finished run."""

from __future__ import annotations

import csv
import json
import os

import pytest
import torch
from PIL import Image

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.data import photos
from s2a_cli.results.predictions import SHOWN, Gallery, Prediction
from s2a_cli.training import prediction
from s2a_cli.training.trained import load


@pytest.fixture
def folder(tmp_path):
    """Five photos in two folders, of which one can't be read."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for number in range(4):
        path = place / ("more" if number > 2 else "") / f"{number}.png"
        Image.effect_mandelbrot((40, 30), (-2 + number, -1, 1, 1), 9 + number).convert("RGB").save(path)
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:60])
    (place / "notes.txt").write_text("no photo")
    return place


def test_a_photo_is_what_the_logits_say(finished, folder):
    trained = load(finished[0])
    paths = photos.find([str(folder)])
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png", "cut.png", "3.png"]
    found = list(prediction.predict(trained, paths, top=3))
    assert [bool(one.trouble) for one in found] == [False, False, False, True, False]
    for one in found:
        if not one.trouble:
            logits = trained(trained.transform(Image.open(one.path))[None])[0]
            expected = logits.softmax(0).topk(3)
            assert [name for name, _ in one.classes] == [trained.classes[i] for i in expected.indices]
            torch.testing.assert_close(torch.tensor([p for _, p in one.classes]), expected.values)


def test_decoding_stays_ahead_and_no_further(folder, monkeypatch, finished):
    """However many photos there are, few are in memory."""
    monkeypatch.setattr(photos, "AHEAD", 4)
    taken = []
    paths = (taken.append(n) or folder / "0.png" for n in range(1000))
    read = photos.read(paths, load(finished[0]).transform, workers=2)
    for _ in range(10):
        next(read)
    assert len(taken) <= 10 + 4 + 1
    read.close()


def test_photos_are_found_by_name_folder_and_pattern(folder):
    assert photos.find([str(folder / "*.png"), str(folder / "0.png")]) == sorted(folder.glob("*.png"))
    for word, said in (("nothing*", "no photo matches it"), ("no.jpg", "no such file")):
        with pytest.raises(UserError, match=said):
            photos.find([word])
    (folder.parent / "empty").mkdir()
    with pytest.raises(UserError, match="no photo in this folder"):
        photos.find([str(folder.parent / "empty")])


def test_predict_from_the_command_line(finished, folder, tmp_path, capsys):
    run = [f"run={finished[0]}", "device=cpu"]
    assert main(["predict", *run, f"images={folder}", "top=2"]) == 1  # one can't be read
    printed = capsys.readouterr()
    assert printed.out.count(" %") == 8 and "cut.png: can't be read" in printed.err
    out, page = tmp_path / "p.csv", tmp_path / "page.html"
    for _ in range(2):  # what is of ours is replaced
        assert main(["predict", *run, f"{folder}/0.png", "top=2", f"out={out}", f"gallery={page}"]) == 0
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert row["image"].endswith("0.png") and float(row["probability"]) >= float(row["probability_2"]) > 0
    assert page.read_text().count("<figure>") == 1
    assert main(["predict", *run, f"images={folder}", f"out={tmp_path / 'p.json'}"]) == 1
    listed = json.loads((tmp_path / "p.json").read_text())
    assert len(listed) == 5 and sum("error" in one for one in listed) == 1


def test_a_name_that_is_not_utf_8_loses_no_row(finished, tmp_path, capsys):
    (tmp_path / os.fsdecode(b"th\xe9.png")).write_bytes(b"no photo")
    Image.new("RGB", (32, 32)).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    for out in ("p.csv", "p.json"):
        words = [f"images={tmp_path}", f"out={tmp_path / out}", f"gallery={tmp_path / 'page.html'}"]
        assert main(["predict", f"run={finished[0]}", "device=cpu", *words]) == 1, capsys.readouterr().err
        assert "caf\\udce9.png" in (tmp_path / out).read_text() and "th\\udce9.png" in (tmp_path / out).read_text()
    page = (tmp_path / "page.html").read_text()
    assert "caf\\udce9.png" in page and "th\\udce9.png" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images=photo.jpg"], "no such file"),
        ([], "the photos to classify"),
        (["images=."], "no photo in this folder"),
        (["photo.png", "top=0"], "top=0: expected an integer"),
        (["photo.png", "out=p.xls"], "ends in .csv or .json"),
        (["photo.png", "out=mine.csv"], "holds no predictions"),
        (["photo.png", "out=/proc/x.csv"], "out=/proc/x.csv: can't be written ("),
        (["photo.png", f"out={300 * 'a'}.csv"], "(File name too long)"),
        ([f"images={300 * 'a'}.png"], "no such file"),
        (["photo.png", "gallery=mine.html"], "was not made by s2a"),
        (["photo.png", "gallery=page.pdf"], "gallery=page.pdf: is a page; expected a file that ends in .html or .htm"),
        (["photo.png", "out=q.csv", "gallery=none/page.html"], "gallery=none/page.html: there is no folder none"),
        (["photo.png", "deviec=cpu"], "did you mean 'device'"),
        (["photo.png", "top=1", "top=2"], "top=: expected once"),
    ],
)
def test_what_cannot_be_predicted(finished, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.csv", "mine.html"):
        (tmp_path / name).write_text("my own")
    Image.new("RGB", (32, 32)).save(tmp_path.parent / "photo.png")
    words = [word.replace("photo.png", "../photo.png") for word in words]
    assert main(["predict", f"run={finished[0]}", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine.csv", "mine.html"}


def test_a_page_keeps_the_least_certain():
    page = Gallery()
    for number in range(SHOWN + 10):
        page.add(Prediction(f"{number}.jpg", [("a", 0.5 + number / 10000)]))
    assert max(-certain for certain, _, _ in page._kept) == pytest.approx(0.5 + (SHOWN - 1) / 10000)
