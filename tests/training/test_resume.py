"""A run that was broken off goes on exactly as if it had not been: the same tensors and figures, byte for byte."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.results import record, run_folder
from s2a_cli.training import checkpoints, forecast, loop, trainer
from s2a_cli.training import run as run_module

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *("dataset=digits", "dataset.shots=8", "backbone=vit_micro", "method=bias", "device=cpu", "workers=0"),
    *("optim.epochs=2", "optim.batch_size=20", "save_steps=1"),  # 4 steps an epoch
    *("backbone.kwargs.depth=2", "backbone.pretrained=false"),
]
WHOLE = ["backbone.kwargs.depth=6", "backbone.pretrained=true"]  # the weights that ship with s2a
COUPLED = ["optim.mixup=0.2", "backbone.kwargs.drop_path_rate=0.2", "quant.rounding=stochastic", "optim.clip_grad=1"]


class Killed(BaseException):
    """Nothing in the runner catches it, as nothing catches a kill -9."""


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch):
    monkeypatch.setattr(forecast, "predict", lambda run: None)


def train(folder, *words, force=False):
    return trainer.train(compose([*QUICK, f"run_dir={folder}", *words]), force)[0]


def outcome(folder):
    """All that must be equal: tensors, figures, and the metrics of epochs apart from times."""
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]
    tensors = (folder / checkpoints.FILE).read_bytes()
    return result["status"], result["id"], result["accuracy"], lines, tensors


def breaks_at(monkeypatch, step, how=Killed):
    """The process is gone after so many steps of this life."""
    train_one, count = loop.TrainLoop._train, [0]

    def one(self, *args):
        stops = train_one(self, *args)
        count[0] += 1
        if count[0] == step:
            if how is Killed:
                raise Killed
            signal.raise_signal(how)
            return True, False
        return stops

    monkeypatch.setattr(loop.TrainLoop, "_train", one)


@pytest.mark.parametrize(
    "words",
    [
        ["quant=int4", *COUPLED],
        ["method=full", "quant=none", "optim.name=sgd", "optim.cutmix=1.0"],
        ["method=s2a", "quant=tiny", "precision=amp-fp16", "optim.micro_batch=7"],
    ],
    ids=["coded", "full", "fp16"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, words):
    train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        for step in (2, 3, 2):  # in the first epoch, in the second, and once more there
            breaks_at(patch, step)
            with pytest.raises(Killed):
                train(tmp_path / "broken", *words)
            patch.undo()
            patch.setattr(forecast, "predict", lambda run: None)
        assert record.read_result(tmp_path / "broken")["status"] == "interrupted"
    train(tmp_path / "broken", *words)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert not (tmp_path / "broken" / checkpoints.STATE).exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_for_the_end_of_a_step_and_saves(tmp_path, monkeypatch, how):
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        breaks_at(patch, 3, how)
        result = train(tmp_path / "broken", "save_steps=null")
    assert (result["status"], result["error"]) == ("interrupted", "interrupted")
    assert checkpoints.load_state(tmp_path / "broken")["sofar"]["step"] == 3
    train(tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("step, place", [(2, "step 3 of 4"), (4, "validation")])
def test_where_a_run_goes_on_is_a_step_that_there_is(tmp_path, monkeypatch, capsys, step, place):
    with monkeypatch.context() as patch:
        breaks_at(patch, step, signal.SIGINT)
        train(tmp_path)
    capsys.readouterr()
    train(tmp_path)
    assert f"going on in {tmp_path}: epoch 1, {place}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Killed()], ids=["full disk", "kill"]
)
def test_whatever_write_breaks_the_old_file_stays_whole(tmp_path, monkeypatch, error):
    words = ["optim.epochs=1", "dataset.shots=4"]  # two steps
    train(tmp_path / "whole", *words)
    real, calls = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append(args), real(*args)))
    train(tmp_path / "counted", *words)
    assert {os.path.basename(target) for _, target in calls} >= {
        "result.json",
        "state.pt",
        "metrics.jsonl",
        checkpoints.FILE,
    }
    for number in range(
        1, len(calls) + 1, 3 if isinstance(error, OSError) else 1
    ):  # a full disk is a kill with more to say
        folder, count = tmp_path / f"broken {number}", [0]

        def breaks(source, target, number=number, count=count):
            count[0] += 1
            if count[0] == number or (count[0] > number and isinstance(error, OSError)):  # a disk stays full
                raise error
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", breaks)
            with pytest.raises(type(error)):
                train(folder, *words)
        assert not list(folder.glob(".*.????????")), "litter"
        if (folder / "result.json").exists():
            assert record.read_result(folder)["status"] == "interrupted"
        train(folder, *words)
        assert outcome(folder) == outcome(tmp_path / "whole")


def test_whatever_write_of_a_repetition_breaks_a_finished_run_is_there(tmp_path, monkeypatch):
    words, full = ["optim.epochs=1", "save_steps=2"], OSError(errno.ENOSPC, "No space left on device")
    for name, seed in (("old", 0), ("new", 1)):
        train(tmp_path / name, *words, f"seed={seed}")
    whole = {name: outcome(tmp_path / name) for name in ("old", "new")}
    real = os.replace
    for number, error in ((1, Killed()), (4, full), (7, Killed())):  # the record, the tensors, the state
        folder, count = shutil.copytree(tmp_path / "old", tmp_path / f"broken {number}"), [0]

        def breaks(source, target, number=number, count=count, error=error):
            count[0] += 1
            if count[0] == number or (count[0] > number and error is full):  # a disk stays full
                raise error
            real(source, target)

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(os, "replace", breaks)
            train(folder, *words, "seed=1", force=True)
        assert outcome(folder) == whole["old"], number
        if number == 1:  # nothing of the new run had been written
            with pytest.raises(UserError, match="--force replaces it"):
                train(folder, *words, "seed=1")
        train(folder, *words, "seed=1", force=number == 1)
        assert outcome(folder) == whole["new"] and not (folder / run_folder.NEXT).exists(), number


def test_a_disk_that_is_full_while_a_state_is_written_says_so(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save_state(
        tmp_path, dict.fromkeys(checkpoints.KEYS) | {"sofar": {"epoch": 1, "step": 0}, "a": torch.ones(3)}
    )
    monkeypatch.setattr(checkpoints, "atomic_file", lambda path: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_state(tmp_path, {"a": torch.zeros(10_000)})
    assert checkpoints.load_state(tmp_path)["a"].sum() == 3


def test_temporary_files_of_a_process_killed_inside_a_write_are_removed(tmp_path):
    (tmp_path / ".state.pt.abcdefgh").write_bytes(b"half")
    train(tmp_path, "optim.epochs=1")
    assert not list(tmp_path.glob(".state*"))


def killed_at(step, folder, monkeypatch):
    with monkeypatch.context() as patch:
        breaks_at(patch, step)
        with pytest.raises(Killed):
            train(folder)


def test_a_state_of_another_run_or_one_that_is_not_wanted_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "QUICK", [*QUICK, *WHOLE])
    killed_at(3, tmp_path / "0", monkeypatch)
    for copy in "123":
        shutil.copytree(tmp_path / "0", tmp_path / copy)
    seen = []
    monkeypatch.setattr(loop.TrainLoop, "__call__", lambda self, state: seen.append(state))
    with pytest.raises(
        UserError, match="holds an unfinished run of another config .seed=0, here 1.; --force replaces it"
    ):
        train(tmp_path / "1", "seed=1")
    train(tmp_path / "1", "seed=1", force=True)
    train(tmp_path / "2", force=True)
    train(tmp_path / "3", "workers=1", "save_minutes=9")  # neither changes what a run computes
    assert seen[:2] == [None, None] and seen[2]["sofar"]["step"] == 2


def test_a_damaged_state_is_named(tmp_path, monkeypatch):
    killed_at(1, tmp_path, monkeypatch)
    (tmp_path / checkpoints.STATE).write_bytes(b"PK not a checkpoint")
    with pytest.raises(UserError, match="state.pt: damaged .*--force"):
        train(tmp_path)


def test_a_state_from_which_none_can_go_on_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        breaks_at(patch, 2)
        with pytest.raises(Killed):
            train(tmp_path)
    state = checkpoints.load_state(tmp_path)
    changes = [{"optimizer": {"state": {}, "param_groups": []}}, {"optimizer": {}}, {"schedule": 3}, {"model": [1]}]
    changes += [{"sofar": {"epoch": 1, "step": 2, "odd": 2}}, {"sofar": {"epoch": 1}}]
    for change in changes:
        checkpoints.save_state(tmp_path, state | change)
        with pytest.raises(UserError, match="state.pt: damaged .*--force"):
            train(tmp_path)
    assert train(tmp_path, "optim.epochs=1", force=True)["status"] == "ok"


def test_two_processes_are_not_at_the_same_run(tmp_path):
    with run_folder.claimed(tmp_path), pytest.raises(UserError, match="another process is at this run"):
        train(tmp_path)
    with run_folder.claimed(tmp_path):
        pass


def test_a_part_of_a_batch_and_skipped_batches_have_the_images_that_they_should(tmp_path):
    run = run_module.prepare(compose(QUICK))

    def images(part, skip=0):
        loader = trainer.data.loader(
            run.splits.train, trainer.data.build_transform(run.backbone.image, run.config.dataset, True), 9,
            seed=3, train=True, workers=0, part=part,
        )  # fmt: skip
        loader.epoch, loader.skip = 2, skip
        return [images for images, _ in loader]

    whole, halves = images((0, 1)), [images((rank, 2)) for rank in (0, 1)]
    assert all((a == b).all() for a, b in zip(images((0, 1), 3), whole[3:], strict=True))
    for batch, first, second in zip(whole, *halves, strict=True):
        assert (batch[0::2] == first).all() and (batch[1::2] == second).all()


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    words = [*QUICK, *COUPLED, "optim.epochs=4", "quant=int4"]

    def start(folder):
        command = [sys.executable, "-m", "s2a_cli", "train", *words, f"run_dir={folder}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0
    chance, killed = random.Random(0), 0
    for _ in range(3):
        process = start(tmp_path / "broken")
        while process.poll() is None and not (tmp_path / "broken" / checkpoints.STATE).exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    process = start(tmp_path / "broken")
    said = process.communicate()[0]
    assert process.returncode == 0 and "going on in" in said
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
