"""Sweeps beyond one machine: submitit's local imitation of SLURM and a local Ray cluster, with lost workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import SweepConfig
from s2a_cli.results import run_folder
from s2a_cli.sweeps.launchers import make_launcher, remote
from s2a_cli.training import checkpoints

pytestmark = pytest.mark.xdist_group("launchers")  # `whole` is made once

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *("dataset=digits", "dataset.shots=8", "backbone=vit_micro", "method=bias", "device=cpu", "workers=0"),
    *(
        "optim.epochs=8",
        "optim.batch_size=20",
        "save_steps=1",
        "quant=none",
        "backbone.kwargs.depth=2",
        "backbone.pretrained=false",
    ),
]
LAUNCHERS = {
    "slurm": ["sweep.launcher=slurm", "sweep.slurm={cluster: local, timeout_min: 10}"],
    "ray": ["sweep.launcher=ray"],
}


def sweep(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "s2a_cli", "sweep", *QUICK, f"sweep.dir={folder}", *words]
    # Ray's workers compute in one thread; with another number the last bits would be others.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent, env=environment
    )


def outcomes(folder: Path) -> dict[str, tuple]:
    """Returns {run: all that must be equal}."""
    found = {}
    for path in folder.glob("*/*/*/*/result.json"):
        result = json.loads(path.read_text())
        found[path.parent.name] = result["status"], result["accuracy"], (path.parent / checkpoints.FILE).read_bytes()
    return found


def half_way(folder: Path, but: list[Path]) -> tuple[int, Path]:
    """Returns (process, run) of this folder, as soon as one has saved where it is."""
    return until(lambda: next((found for found in trainings(folder) if found[1] not in but and saved(found[1])), None))


def saved(run: Path) -> bool:
    return (run / checkpoints.STATE).exists()


def trainings(folder: Path) -> list[tuple[int, Path]]:
    """Returns (process, run) of this folder, without processes that only bear such a name in their words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:4] == ["-m", "s2a_cli", "train"]:
            runs = [Path(word.removeprefix("run_dir=")) for word in words if word.startswith(f"run_dir={folder}/")]
            found += [(int(path.parent.name), run) for run in runs]
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def until(condition, seconds: float = 240):
    """Waits for a condition and returns what it returns; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the outcomes of the same runs, undisturbed and in this process."""
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        for seed in range(3):
            assert main(["train", *QUICK, f"seed={seed}"]) == 0
    torch.set_num_threads(threads)
    found = outcomes(folder / "runs")
    assert len(found) == 3
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("launcher", "blows"), [("slurm", ["run", "worker", "warning"]), ("ray", ["run", "worker"])])
def test_runs_whose_process_or_worker_is_killed_or_out_of_time_go_on(tmp_path, whole, launcher, blows):
    pytest.importorskip({"slurm": "submitit", "ray": "ray"}[launcher], reason=f"pip install 's2a[{launcher}]'")
    folder, hit = tmp_path / "runs", []
    process = sweep(folder, *LAUNCHERS[launcher], f"seed={','.join(map(str, range(len(blows))))}")
    for blow in blows:
        training, run = half_way(folder, hit)
        if blow == "run":
            os.kill(training, signal.SIGKILL)
        else:  # SIGUSR2 is what SLURM sends before a job's time is over
            os.kill(parent(training), signal.SIGKILL if blow == "worker" else signal.SIGUSR2)
        hit.append(run)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"{len(blows)} done" in said, said
    found = outcomes(folder)
    assert len(found) == len(blows) and found.items() <= whole.items()
    for log in folder.glob("*/*/*/*/log.txt"):
        struck = int(log.parent in hit)
        assert log.read_text().count("going on in") == struck and log.read_text().count("$ s2a train") == 1 + struck
        assert log.read_text().count("epoch 8/8") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_jobs_outlive_their_sweep_and_the_next_one_finds_them(tmp_path, whole):
    pytest.importorskip("submitit", reason="pip install 's2a[slurm]'")
    folder = tmp_path / "runs"
    words = [*LAUNCHERS["slurm"], "seed=0,1"]
    process = sweep(folder, *words)
    until(lambda: len(list(folder.glob("*/*/*/*/slurm/job.json"))) == 2)  # submitted; no run has its folder yet
    process.kill()
    process.communicate()
    jobs = {path: path.read_text() for path in folder.glob("*/*/*/*/slurm/job.json")}
    process = sweep(folder, *words)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "0 failed" in said, said
    assert {path: path.read_text() for path in jobs} == jobs, "a job was submitted twice"
    found = outcomes(folder)
    assert len(found) == 2 and found.items() <= whole.items()
    assert all(path.read_text().count("$ s2a train") == 1 for path in folder.glob("*/*/*/*/log.txt"))


class Attempt:
    """A job that ends at once."""

    def __init__(self, code):
        self.code, self.stopped = code, False

    def poll(self):
        return self.code

    def stop(self):
        self.stopped = True


@pytest.mark.parametrize(
    ("codes", "end"),
    [
        ([0], 0),
        ([1], 1),  # it failed: another attempt would as well
        ([2], 2),
        ([-9, 0], 0),
        ([remote.LOST, remote.INTERRUPTED, 0], 0),
        ([-9, -9, -9, 0], -9),
    ],
)
def test_what_is_lost_is_tried_again_twice_and_never_from_the_start(codes, end):
    left, seen = list(codes), []

    def start(words):
        seen.append(words)
        return Attempt(left.pop(0))

    job = remote.RetriedJob(["seed=1", "--force"], start)
    code = next(code for _ in range(9) if (code := job.poll()) is not None)
    assert code == end
    assert seen == [["seed=1", "--force"], *[["seed=1", "--once"]] * (len(seen) - 1)] and len(seen) == min(
        3, len(codes)
    )


def test_what_was_stopped_is_not_tried_again():
    job = remote.RetriedJob([], lambda words: Attempt(remote.INTERRUPTED))
    job.stop()
    assert job.poll() == remote.INTERRUPTED


def test_slots_of_a_queue():
    assert remote.Queue(None).free({0: None, 1: None, 3: None}, None) == 2
    assert remote.Queue(2).free({0: None}, 99.0) == 1 and remote.Queue(2).free({0: None, 1: None}, None) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partitoin": "gpu"}, "sweep.slurm.partitoin: no such setting of submitit.*did you mean 'partition'"),
        ({"timeout_min": "long"}, "sweep.slurm: .*timeout_min.*int"),
        ({"cluster": "lokal"}, "sweep.slurm.cluster=lokal: expected slurm, or local"),
    ],
)
def test_settings_of_slurm_are_checked_before_anything_runs(settings, said):
    pytest.importorskip("submitit", reason="pip install 's2a[slurm]'")
    with pytest.raises(UserError, match=said):
        make_launcher(SweepConfig(launcher="slurm", slurm={"cluster": "local"} | settings), ["cpu"])


def test_without_slurm_it_says_so(monkeypatch):
    pytest.importorskip("submitit", reason="pip install 's2a[slurm]'")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="srun.*sweep.slurm.cluster=local"):
        make_launcher(SweepConfig(launcher="slurm"), ["cpu"])


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_package_is_named(monkeypatch, launcher, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 's2a\[{launcher}\]'"):
        make_launcher(SweepConfig(launcher=launcher), ["cpu"])


def test_a_cluster_gets_what_a_run_needs_and_no_secret(monkeypatch, tmp_path):
    from s2a_cli.sweeps.launchers.ray import Task

    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "GITHUB_TOKEN",
        "S2A_DATA",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "PHOTOS",
    ):
        monkeypatch.setenv(name, f"of {name}")
    sent = []

    class Remote:
        def remote(self, *arguments):
            sent.append(arguments)

    words = ["dataset=folder", "dataset.root=${oc.env:PHOTOS}/pets", "seed=1"]
    Task(Remote(), words, tmp_path / "log")
    got = sent[0][3]
    assert {name: got[name] for name in ("S2A_DATA", "OMP_NUM_THREADS", "HF_HOME", "PHOTOS")} == {
        name: f"of {name}" for name in ("S2A_DATA", "OMP_NUM_THREADS", "HF_HOME", "PHOTOS")
    }
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GITHUB_TOKEN", "PATH", "HOME"} & got.keys()
    Task(Remote(), ["seed=1"], tmp_path / "log")
    assert "PHOTOS" not in sent[1][3]


def test_runs_are_packed_on_gpus_of_this_machine_alone():
    with pytest.raises(UserError, match="sweep.pack=true"):
        make_launcher(SweepConfig(launcher="slurm", pack=True), ["cpu"])


def test_a_run_waits_until_the_last_attempt_has_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SAVING", 0.1)
    with run_folder.claimed(tmp_path):
        began = time.monotonic()
        remote.wait_until_saved(tmp_path)
    assert time.monotonic() - began >= 0.1
