"""Searches: what they are over, that they go on exactly where they were and leave the test split alone."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.config.compose import compose
from s2a_cli.results import record

optuna = pytest.importorskip("optuna", reason="pip install 's2a[optuna]'")
from s2a_cli.sweeps import search  # noqa: E402

TINY = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    "dataset=digits",
    "dataset.shots=4",
    "backbone=vit_micro",
    "optim.batch_size=16",
    "device=cpu",
    "workers=0",
    "optim.epochs=1",
    "backbone.kwargs.depth=2",
    "backbone.pretrained=false",
]
LR = "optim.lr=tag(log,interval(1e-4,1e-1))"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Peak:
    """A launcher whose runs end at once; validation is best at a learning rate of 1e-2.

    fails: numbers of starts that fail.
    """

    note, workers = "", 1

    def __init__(self, fails=(), breaks=None, figure="val_top1"):
        self.fails, self.breaks, self.figure, self.started = fails, breaks, figure, []

    def free(self, running, peak_mib):
        return next((slot for slot in range(self.workers) if slot not in running), None)

    def start(self, words, log, slot):
        self.started.append(words)
        number = len(self.started)
        if number == self.breaks:
            raise KeyboardInterrupt
        member = MADE[log.parent]
        config, content = member.config, json.loads(member.content)
        ok = number not in self.fails
        result = {
            "schema": record.SCHEMA,
            "id": "0" * 12,
            "status": "ok" if ok else "failed",
            "error": None if ok else "it broke",
            "memory": None,
            "config": OmegaConf.to_container(config, resolve=True),
            "allocation": None,
            "accuracy": {"test_top1": None, self.figure: 90 - 10 * abs(math.log10(config.optim.lr) + 2)},
            "data": {"name": "digits", "revision": content["data"]},
            "weights": content["weights"],
        }
        record.write_result(log.parent, result)
        return type("Job", (), {"poll": lambda self: 0 if ok else 1, "stop": lambda self: None})()

    def close(self):
        pass


MADE = {}  # folder -> what lies there


@pytest.fixture
def on(monkeypatch):
    """Returns a function that puts a launcher in the place of real processes."""

    def put(launcher):
        monkeypatch.setattr(search, "make_launcher", lambda settings, devices: launcher)
        return launcher

    known = search.Known.member

    def member(self, *args):
        made = known(self, *args)
        MADE[made.folder] = made
        return made

    monkeypatch.setattr(search.Known, "member", member)
    return put


def told(path="runs/search"):
    """Returns the trials of the only study there."""
    (file,) = Path(path).glob("*.db")
    study = optuna.load_study(storage=f"sqlite:///{file}", study_name=file.stem)
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in study.trials]


def test_the_space_in_hydras_grammar():
    ranges = {
        "a": "a=interval(0,1)",
        "b": "b=tag(log,interval(1e-4,1e-2))",
        "c": "c=range(2,17,2)",
        "d": "d=choice(0,1e-4,true)",
        "e": "e=tag(log,int(interval(1,64)))",
        "f": "f=0.5,null",
        "method": "method=glob(b*)",
    }
    found = search.Space(ranges, []).distributions()
    of = optuna.distributions
    assert found == {
        "a": of.FloatDistribution(0, 1),
        "b": of.FloatDistribution(1e-4, 1e-2, log=True),
        "c": of.IntDistribution(2, 16, step=2),
        "d": of.CategoricalDistribution(["0", "0.0001", "True"]),
        "e": of.IntDistribution(1, 64, log=True),
        "f": of.CategoricalDistribution(["0.5", "null"]),
        "method": of.CategoricalDistribution(["bias", "bitfit", "boft"]),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1e-3"], "nothing to search: give a setting a range: optim.lr=tag(log,interval(1e-4,1e-2))"),
        ([LR, "search.trails=3"], "search.trails: no such setting; accepted: search.trials, search.name"),
        ([LR, "search.trials=0"], "search.trials=0: expected an integer of at least 1"),
        ([LR, "search.name=../x"], "search.name=../x: expected letters, digits, - and _"),
        ([LR, "search.trials=" + "9" * 400], "expected an integer of at least 1, at most 999999"),
        (["optim.lr=interval(0,1e999)"], "optim.lr=interval(0,1e999): expected finite numbers"),
        (["optim.lr=range(0,1e9)"], "has 1,000,000,000 values; a grid has at most 10,000 runs"),
        ([LR, "test=true"], "test=true: a search leaves the test split alone"),
        (["optim.lr=interval(1,0.1)"], "optim.lr=interval(1,0.1): expected interval(LOW,HIGH) with LOW below HIGH"),
        (
            ["optim.lr=tag(log,interval(0,1))"],
            "optim.lr=tag(log,interval(0,1)): expected interval(LOW,HIGH) with LOW below HIGH and",
        ),
        (["optim.lr=tag(lin,interval(0,1))"], "optim.lr=tag(lin,interval(0,1)): tag 'lin' is not known"),
        (["optim.lrr=interval(0,1)"], "optim.lrr: no such setting"),
        (["method.rank=range(1,4)", "method=prompt", "dataset=pest"], "dataset=pest: expected one of"),
    ],
)
def test_a_search_that_can_not_be_is_refused(words, said, capsys):
    assert main(["search", *(TINY if "dataset=pest" not in words else []), *words]) == 2
    assert said in capsys.readouterr().err


def test_it_finds_the_best_by_validation_and_prints_the_line_that_trains_it(on, capsys):
    launcher = on(Peak())
    assert main(["search", *TINY, LR, "quant=none,int4", "search.trials=11"]) == 0
    said = capsys.readouterr().out
    assert all("test=false" in words for words in launcher.started) and len(launcher.started) == 11
    best = max(told(), key=lambda trial: trial[3])
    line = shlex.split(said.strip().splitlines()[-1])
    assert line[:2] == ["s2a", "train"] and line[-1] == "test=true"
    assert f"optim.lr={best[2]['optim.lr']}" in line and f"quant={best[2]['quant']}" in line
    assert best[3] > 85 and compose(line[2:]).test
    assert "best 5 of 11 finished trials" in said
    assert int(re.search(r"importance \(fANOVA\): optim.lr (\d+) %", said)[1]) > 50


def test_the_same_line_again_goes_on_as_if_it_had_not_been_broken_off(on, capsys, tmp_path):
    words = ["search", *TINY, LR, "search.trials=5"]
    on(Peak())
    assert main([*words, "sweep.dir=whole"]) == 0
    on(Peak(breaks=3))
    assert main(words) == 130
    assert [trial[1] for trial in told()] == ["COMPLETE"] * 2 + ["RUNNING"]
    launcher = on(Peak())
    assert main(words) == 0
    assert told() == told("whole/search") and len(launcher.started) == 3
    launcher = on(Peak())
    assert main(words) == 0 and not launcher.started
    assert main([*words[:-1], "search.trials=6"]) == 0 and len(launcher.started) == 1


def test_a_failed_trial_is_replaced(on, capsys):
    launcher = on(Peak(fails=(2, 3)))
    assert main(["search", *TINY, LR, "search.trials=3"]) == 0
    assert [trial[1] for trial in told()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"] and len(
        launcher.started
    ) == 5
    assert "best 3 of 3 finished trials; 2 failed" in capsys.readouterr().out


def test_a_search_in_which_all_fails_ends(on, capsys):
    launcher = on(Peak(fails=range(99)))
    assert main(["search", *TINY, LR, "search.trials=3"]) == 1
    said = capsys.readouterr()
    assert (
        "5 trials in a row failed; the last: it broke" in said.err
        and "no trial is finished" in said.out
        and len(launcher.started) == 5
    )


def test_several_trials_at_once(on):
    launcher = on(Peak())
    launcher.workers = 3
    assert main(["search", *TINY, LR, "search.trials=4"]) == 0
    assert [trial[1] for trial in told()] == ["COMPLETE"] * 4 and len({trial[2]["optim.lr"] for trial in told()}) == 4


def test_a_study_over_something_else_is_not_gone_on_with(on, capsys):
    on(Peak())
    assert main(["search", *TINY, LR, "search.trials=1", "search.name=mine"]) == 0
    assert main(["search", *TINY, LR, "seed=1", "search.trials=1", "search.name=mine"]) == 2
    assert "mine.db: a search over something else (seed=1 is in one of them only)" in capsys.readouterr().err
    Path("runs/search/broken.db").write_text("not a database, but long enough to be looked at")
    assert main(["search", *TINY, LR, "search.name=broken"]) == 2
    assert "broken.db: can't be used as a study" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["data", "weights"])
def test_a_study_over_other_data_or_weights_is_not_gone_on_with(on, capsys, monkeypatch, what):
    on(Peak())
    words = ["search", *TINY, LR, "search.name=mine"]
    assert main([*words, "search.trials=1"]) == 0 and main([*words, "search.trials=2"]) == 0
    summary = search.Known._summary
    if what == "data":
        monkeypatch.setattr(search.Known, "_summary", lambda *args: ("f" * 12, *summary(*args)[1:]))
    else:
        monkeypatch.setattr(search.Known, "_fingerprint", lambda *args: "f" * 12)
    assert main([*words, "search.trials=3"]) == 2 and len(told()) == 2
    assert f"mine.db: a search over something else (the {what} changed since)" in capsys.readouterr().err


def test_every_data_set_and_backbone_that_is_searched_stays_as_it_was(on, capsys, monkeypatch):
    on(Peak())
    words = ["search", *TINY, LR, "backbone=vit_micro,vit_t", "search.name=mine"]
    assert main([*words, "search.trials=1"]) == 0 and main([*words, "search.trials=2"]) == 0
    fingerprint = search.Known._fingerprint
    monkeypatch.setattr(
        search.Known,
        "_fingerprint",
        lambda self, config, *args: "f" * 12 if config.backbone.name == "vit_t" else fingerprint(self, config, *args),
    )
    assert main([*words, "search.trials=3"]) == 2 and len(told()) == 2
    assert "(the weights of backbone=vit_t changed since)" in capsys.readouterr().err


def test_the_figure_has_the_name_that_runs_have_for_it(on, capsys):
    on(Peak(figure="val_map"))
    assert main(["search", *TINY, LR, "search.trials=1"]) == 0
    said = capsys.readouterr().out
    assert "val mAP %" in said and "by validation mAP" in said and "top-1" not in said


def test_settings_that_do_not_fit_are_told_with_the_trial_behind_them(on, capsys):
    on(Peak())
    assert main(["search", *TINY, "method=prompt", "method.rank=range(100000,100003)"]) == 2
    assert "rank" in capsys.readouterr().err


def test_without_a_validation_split_there_is_no_search(monkeypatch, capsys):
    monkeypatch.setattr(search.data, "load", lambda config: type("Splits", (), {"val": []})())
    assert main(["search", *TINY, LR]) == 2
    assert "dataset=digits: no image is left for validation" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", *TINY, LR]) == 2
    assert "pip install 's2a[optuna]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, "-m", "s2a_cli", "search", *TINY, "optim.epochs=2", "quant=none", LR, "search.trials=2"]
    command += ["search.name=s", "method=bias", "sweep.workers=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, end = tmp_path / "runs/search/s.db", time.monotonic() + 120
    while time.monotonic() < end and not list(tmp_path.glob("runs/digits/*/*/*/metrics.jsonl")):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    states = sqlite3.connect(file).execute("select state from trials order by number").fetchall()
    assert states == [("COMPLETE",)] * 2
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/digits/*/*/*/result.json")]
    assert len(results) == 2 and all(r["status"] == "ok" and r["accuracy"]["test_top1"] is None for r in results)


def test_a_search_whose_validation_has_no_label_ends(on, capsys, monkeypatch):
    launcher = on(Peak())
    monkeypatch.setattr(record, "headline", lambda accuracy: record.Headline("mAP", None, None))
    assert main(["search", *TINY, LR, "search.trials=3"]) == 1
    assert "the last: none of its validation images has a label" in capsys.readouterr().err
    assert len(launcher.started) == 5
