"""A grid whose processes are killed at random moments does every run once when it is started again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2a_cli.cli.main import main
from s2a_cli.training import checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("killed"),  # `whole` is made once
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]

GRID = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *("dataset=digits", "dataset.shots=16", "backbone=vit_micro", "device=cpu", "workers=0", "quant=none"),
    *("optim.epochs=5", "optim.batch_size=20", "save_steps=2", "method=bias", "seed=0,1", "sweep.workers=2"),
    *("backbone.kwargs.depth=2", "backbone.pretrained=false"),
]
RUNS = 2


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "s2a_cli", "sweep", *GRID, f"sweep.dir={folder}", *words]
    with open(folder.parent / "said.txt", "a") as said:
        # a shell's background jobs ignore Ctrl-C, and hand that down
        as_usual = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, preexec_fn=as_usual)


def said(folder: Path) -> str:
    return (folder.parent / "said.txt").read_text()


def trainings(folder: Path) -> list[int]:
    """Returns the processes that train a run of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if words[1:4] == ["-m", "s2a_cli", "train"] and any(word.startswith(f"run_dir={folder}") for word in words):
            found.append(int(path.parent.name))
    return found


def states(folder: Path) -> list[Path]:
    """Returns the runs that have saved where they are."""
    return list(folder.glob(f"*/*/*/*/{checkpoints.STATE}"))


def outcomes(folder: Path) -> dict[str, tuple]:
    """Returns {run: all that must be equal}: figures, metrics of epochs apart from times, tensors."""
    found = {}
    for path in folder.glob("*/*/*/*/result.json"):
        result, run = json.loads(path.read_text()), path.parent
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]
        found[run.name] = result["status"], result["accuracy"], lines, (run / checkpoints.FILE).read_bytes()
    return found


def attempts(folder: Path) -> dict[str, list[str]]:
    """Returns {run: what each of its attempts said}."""
    logs = folder.glob("*/*/*/*/log.txt")
    return {log.parent.name: log.read_text().split("$ s2a train ")[1:] for log in logs}


def trained_after_the_end(said: list[str]) -> bool:
    """Returns whether a run was trained again once it was done."""
    ends = [index for index, text in enumerate(said) if "\nrun: " in text and "interrupted" not in text]
    return any("epoch " in text for text in said[ends[0] + 1 :]) if ends else False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the outcomes of the same runs, undisturbed and in this process."""
    folder = tmp_path_factory.mktemp("whole")
    words = [word for word in GRID if not word.startswith(("seed=", "sweep."))]
    with contextlib.chdir(folder):
        for seed in range(RUNS):
            assert main(["train", *words, f"seed={seed}"]) == 0
    found = outcomes(folder / "runs")
    assert len(found) == RUNS
    return found


def test_kill_9_of_the_sweep_and_of_runs_at_random_moments(tmp_path, whole):
    folder, chance, killed = tmp_path / "runs", random.Random(3), []
    for life in range(2):
        sweep = start(folder)
        mark, end = (trainings, states)[life % 2], time.monotonic() + 120
        while sweep.poll() is None and not mark(folder) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))  # while it starts, or half-way
        if runs := trainings(folder):
            os.kill(chance.choice(runs), signal.SIGKILL)
            killed.append("run")
        time.sleep(chance.uniform(0, 3))
        if sweep.poll() is None:
            sweep.kill()
            killed.append("sweep")
        sweep.wait()
    assert killed.count("run") >= 1 and killed.count("sweep") >= 1
    assert start(folder).wait() == 0, said(folder)
    assert outcomes(folder) == whole
    assert not any(map(trained_after_the_end, attempts(folder).values()))
    assert not list(folder.glob("*/*/*/*/.*.????????")), "litter"
    assert not trainings(folder)
    assert start(folder).wait() == 0 and f"0 done, {RUNS} skipped" in said(folder)


def test_two_sweeps_at_once_share_the_work(tmp_path, whole):
    folder = tmp_path / "runs"
    both = [start(folder, "sweep.workers=1") for _ in range(2)]
    assert [sweep.wait() for sweep in both] == [0, 0], said(folder)
    assert outcomes(folder) == whole
    trained = [sum("epoch 5/5" in text for text in texts) for texts in attempts(folder).values()]
    assert trained == [1] * RUNS, said(folder)
    assert said(folder).count("0 failed") == 2


def test_after_ctrl_c_it_goes_on(tmp_path, whole):
    folder = tmp_path / "runs"
    sweep, end = start(folder), time.monotonic() + 120
    while not states(folder) and time.monotonic() < end:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert not trainings(folder) and " left" in said(folder) and "s2a: interrupted" in said(folder)
    statuses = [json.loads(path.read_text())["status"] for path in folder.glob("*/*/*/*/result.json")]
    assert "interrupted" in statuses and set(statuses) <= {"interrupted", "ok"}
    assert start(folder).wait() == 0, said(folder)
    assert outcomes(folder) == whole
