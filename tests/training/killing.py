"""Kills trainings, sweeps and repetitions of finished runs with SIGKILL at random moments, and looks for what was lost.

`python tests/training/killing.py 40 FOLDER` kills forty times. Lives are forks of this process, so that none has to
import torch first: the moments fall into the work of a run, and not into the start of Python.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from s2a_cli.cli.main import main
from s2a_cli.common.interrupts import PARENT
from s2a_cli.results import record, run_folder
from s2a_cli.sweeps import sweep as sweeps
from s2a_cli.training import checkpoints, forecast

WORDS = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *(
        "dataset=digits",
        "dataset.shots=8",
        "backbone=vit_micro",
        "method=bias",
        "quant=none",
        "device=cpu",
        "workers=0",
    ),
    *("optim.epochs=3", "optim.batch_size=20", "save_steps=1", "backbone.kwargs.depth=2", "backbone.pretrained=false"),
]
CACHED = [*WORDS, "method=side", "dataset.cache=features", "dataset.scale=null"]


class Life:
    """`s2a WORDS` in a fork; what it says goes to the end of `log`. Has the methods of launchers.Job."""

    def __init__(self, words: list[str], log: Path, parent: bool = False):
        self.code, self.pid = None, os.fork()
        if self.pid:
            return
        code = 99
        with contextlib.suppress(BaseException):
            os.setsid()
            os.environ.pop(PARENT, None)
            if parent:
                os.environ[PARENT] = str(os.getppid())
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(handle, 1), os.dup2(handle, 2)
            faulthandler.enable()
            torch.set_num_threads(
                1
                # PyTorch renews its pool of threads after a fork at the first use, which may not be in two threads at
                # once
            )
            print(f"$ s2a {' '.join(words)}", flush=True)
            code = main(words)
        os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code

    def killed(self, after: float) -> bool:
        """Kills it so many seconds from now. Whether it had not ended by itself."""
        end = time.monotonic() + after
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        return self.code == -signal.SIGKILL


class Forks:
    """A launcher of two slots, whose runs are forks of the sweep."""

    note = ""

    def free(self, running, peak_mib):
        return next((slot for slot in range(2) if slot not in running), None)

    def start(self, words, log, slot):
        return Life(["train", *words], log, parent=True)

    def close(self):
        pass


def outcome(folder: Path) -> tuple:
    """All of a run that must be equal: its record's figures, the metrics of its epochs apart from times, its
    tensors.
    """
    result = record.read_result(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return result["status"], result["id"], result["accuracy"], metrics, (folder / checkpoints.FILE).read_bytes()


def outcomes(root: Path) -> dict[str, tuple]:
    """{id: outcome} of the finished runs of a sweep."""
    found = {
        path.parent for path in root.glob("*/*/*/*/result.json") if record.read_result(path.parent)["status"] == "ok"
    }
    return {folder.name: outcome(folder) for folder in found}


def settled(folder: Path) -> Path:
    """The folder when a process of s2a has opened it: what a kill left half-moved is in place."""
    with run_folder.claimed(folder, wait=30):
        return folder


class Killing:
    """root: a folder to work in.

    `seen` names what was killed, `missed` is the number of lives that had ended before.
    """

    def __init__(self, root: Path, seed: int):
        self.root, self.chance, self.log = root, random.Random(seed), root / "said.txt"
        self.seen: list[str] = []
        self.missed = 0
        os.environ["S2A_DATA"] = str(root / "data")
        assert self._sweep(root / "whole").wait() == 0, self.log.read_text()
        began = time.monotonic()
        assert Life(["train", *CACHED, f"run_dir={root / 'cached'}"], self.log).wait() == 0, self.log.read_text()
        self.whole = outcomes(root / "whole")
        self.seconds = time.monotonic() - began  # of a life, the shortest of those that ended by themselves
        self.folders = {outcome(folder)[1]: folder for folder in map(Path, (root / "whole").glob("*/*/*/*"))}
        self.old, self.new = (
            next(f for f in self.folders.values() if record.read_result(f)["config"]["seed"] == seed) for seed in (0, 1)
        )
        self.cached = outcome(root / "cached")
        self.number = 0

    def _sweep(self, folder: Path) -> Life:
        return Life(["sweep", *WORDS, "seed=0,1", f"sweep.dir={folder}"], self.log)

    def _killed(self, what: str, life: Life, times: float = 1) -> bool:
        """Kills a life, of `times` the usual length, at a random moment. Whether it had not ended by itself."""
        began = time.monotonic()
        killed = life.killed(self.chance.uniform(0, 1) * times * self.seconds)
        if killed:
            self.seen.append(what)
        else:
            self.missed += 1
            self.seconds = min(self.seconds, (time.monotonic() - began) / times)
        return killed

    def train(self) -> None:
        self._train("train", WORDS, outcome(self.old))

    def cache(self) -> None:
        shutil.rmtree(self.root / "data", ignore_errors=True)
        self._train("cached features", CACHED, self.cached)

    def _train(self, what: str, words: list[str], expected: tuple) -> None:
        """A run that is killed, maybe several times, and goes on until it is whole."""
        folder, killed = self._fresh(), True
        while killed and len(self.seen) < self.kills:
            killed = self._killed(what, Life(["train", *words, f"run_dir={folder}"], self.log))
            if self.chance.random() < 0.5:
                break
        assert Life(["train", *words, f"run_dir={folder}"], self.log).wait() == 0, self.log.read_text()
        assert outcome(folder) == expected, folder

    def again(self) -> None:
        """A finished run of another config that is replaced: it, or the new one, is there whole at all times."""
        folder, killed, force = self._fresh(), True, ["--force"]
        shutil.copytree(self.old, folder)
        new = ["train", *WORDS, "seed=1", f"run_dir={folder}"]
        while killed and len(self.seen) < self.kills:
            killed = self._killed("re-run over a finished run", Life([*new, *force], self.log))
            assert record.read_result(folder)["status"] == "ok", folder
            assert outcome(settled(folder)) in (outcome(self.old), outcome(self.new)), folder
            force = [] if (folder / run_folder.NEXT / "result.json").exists() else ["--force"]
        assert Life([*new, *force], self.log).wait() == 0, self.log.read_text()
        assert outcome(folder) == outcome(self.new) and not (folder / run_folder.NEXT).exists(), folder

    def sweep(self) -> None:
        """A sweep and its runs: what one life finished stays as it is, and the last one finishes all."""
        folder, killed = self._fresh(), True
        while killed and len(self.seen) < self.kills:
            before = outcomes(folder)
            killed = self._killed("sweep", self._sweep(folder), times=2)
            for run in folder.glob("*/*/*/*"):  # runs end when they see that their sweep is gone
                settled(run)
            after = outcomes(folder)
            assert before.items() <= after.items() <= self.whole.items(), folder
        logs = folder.glob("*/*/*/*/log.txt")
        assert self._sweep(folder).wait() == 0, "\n".join(path.read_text() for path in (self.log, *logs))
        assert outcomes(folder) == self.whole, folder

    def _fresh(self) -> Path:
        self.number += 1
        return self.root / str(self.number)

    def __call__(self, kills: int) -> None:
        self.kills = kills
        scenes = [self.again, self.train, self.sweep, self.cache]
        while len(self.seen) < kills:
            before = len(self.seen)
            scenes[0]()
            if len(self.seen) > before:  # else its lives ended before their moments, and it comes again
                scenes.append(scenes.pop(0))
        litter = [path for path in self.root.glob("**/.*") if run_folder.LITTER.fullmatch(path.name)]
        assert not litter, litter


if __name__ == "__main__":
    forecast.predict = lambda run: None  # what takes most of the time of so short a run
    sweeps.make_launcher = lambda settings, devices: Forks()
    killing = Killing(Path(sys.argv[2]).resolve(), seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    killing(int(sys.argv[1]))
    for what in sorted(set(killing.seen)):
        print(f"killed {killing.seen.count(what)}: {what}")
    print(f"{killing.missed} had ended before their moment")
    print("nothing that was finished was lost, and all that was broken off came out as if it had not been")
