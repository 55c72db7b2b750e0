"""Grids: what is run, left out, skipped and tried again, and what is said about it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.overrides import expand
from s2a_cli.results import record as records
from s2a_cli.results import run_folder
from s2a_cli.sweeps import planning
from s2a_cli.sweeps import sweep as sweeps
from s2a_cli.sweeps.grid import read_grid
from s2a_cli.sweeps.launchers import local
from s2a_cli.sweeps.launchers.local import Local

TINY = ["dataset.shots=4", "optim.epochs=1", "optim.batch_size=16", "device=cpu", "workers=0"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Fake:
    """A launcher whose runs end at once, as `ends` says: {a word of the run: status, exit code}."""

    note = ""

    def __init__(self, planned, ends=None, workers=1):
        self.members = {str(member.folder): member for member in planned.members}
        self.ends, self.workers, self.started = ends or {}, workers, []

    def free(self, running, peak_mib):
        return next((slot for slot in range(self.workers) if slot not in running), None)

    def start(self, words, log, slot):
        member = self.members[str(log.parent)]
        self.started.append(member.name)
        status, code = next((end for word, end in self.ends.items() if word in words), ("ok", 0))
        content = json.loads(member.content)
        result = {
            "schema": records.SCHEMA,
            "id": "0" * 12,
            "status": status,
            "error": None if code == 0 else "it broke",
            "memory": None,
            "config": OmegaConf.to_container(member.config),
            "allocation": None,
            "accuracy": {"test_top1": 50.0},
            "data": {"name": "digits", "revision": content["data"]},
            "weights": content["weights"],
        }
        records.write_result(log.parent, result)
        log.write_text(f"$ s2a train\nabout to\ns2a: {status}: it broke\n")

        class Job:
            def poll(self):
                return code

            def stop(self):
                pass

        return Job()

    def close(self):
        pass


def go(words, ends=None, **flags):
    planned = planning.plan(read_grid([*TINY, *words]))
    launcher = Fake(planned, ends)
    summary = sweeps.Sweep(planned, launcher, **flags)()
    return launcher.started, summary


def test_a_grid_in_hydras_grammar():
    grid = expand(
        [
            "method=bias,s2a",
            "seed=range(0,2)",
            "quant=glob([int4,int8])",
            "dataset.scale=[0.5,1],null",
            "backbone=vit_b",
        ]
    )
    assert len(grid) == 2 * 2 * 2 * 2 and grid[0] == [
        "method=bias",
        "seed=0",
        "quant=int4",
        "dataset.scale=[0.5,1]",
        "backbone=vit_b",
    ]
    assert [member[1] for member in grid[:9]] == ["seed=0"] * 4 + ["seed=1"] * 4 + ["seed=0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=range(3,0)"], "seed=range.*no values"),
        (["seed=range(0,3,0)"], "seed=range.*with a step other than 0"),
        (["seed=range(nan,3)"], "seed=range.*of finite numbers"),
        (["seed=range(0,1000000000)"], "seed=range.*has 1,000,000,000 values; a grid has at most 10,000 runs"),
        (["optim.lr=range(0,1,1e-320)"], "a grid has at most 10,000 runs"),
        (["seed=range(0,5000)", "optim.epochs=range(1,5000)"], "stand for 24,995,000 runs; a grid has at most 10,000"),
        (["method=glob(x*)"], "matches nothing; there are the .* that `s2a ls methods` lists"),
        (["optim.lr=glob(*)"], "glob.. is for backbone"),
        (["optim.lr=interval(0,1)"], "no end of values; give some"),
        (["method=bais,s3a"], "method=bais: expected one of"),
        (["optim.lrr=1,2"], "optim.lrr: no such setting.*'optim.lr'"),
        (["sweep.wrokers=2"], "sweep.wrokers: no such setting.*'workers'"),
        (["sweep.workers=0"], "sweep.workers=0: expected an integer of at least 1"),
        (["sweep.exclude=[{methd: bias}]"], "sweep.exclude: methd: no such setting.*'method'"),
        (["dataset=folder", "dataset.root=nowhere", "seed=0,1"], "nowhere"),
        (["method=linear", "quant=paper"], "method=linear keeps nothing that quant=paper could code"),
    ],
)
def test_a_grid_that_can_not_be_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        planning.plan(read_grid([*TINY, *words]))


def test_a_part_of_a_grid_that_makes_no_sense_is_left_out_with_its_reason(capsys):
    words = ["method=linear,bias", "quant=none,paper", "optim.micro_batch=null,99", "seed=0,0"]
    words.append("sweep.exclude=[{method: bias, quant: [none], why: known already}]")
    planned = planning.plan(read_grid([*TINY, *words]))
    assert {member.config.method.name + " " + member.config.quant.name for member in planned.members} == {
        "linear none",
        "bias paper",
    }
    said = planning.left_out(planned)
    assert [line.partition(":")[0] for line in said] == ["left out", "left out", "can't be run"]
    assert "method=linear keeps nothing" in said[0] and "known already" in said[1] and "micro_batch=99" in said[2]
    assert [sum(map(len, reasons.values())) for reasons in (planned.excluded, planned.unfit)] == [2, 4]
    assert not planned.repeated, "what stands twice counts once"


def test_the_same_run_twice_is_one():
    planned = planning.plan(read_grid([*TINY, "quant=int4", "quant.bits=4,5", "quant.norm=4", "seed=1", "workers=0,1"]))
    assert len(planned.members) == 2 and planned.repeated == 2


def test_what_is_finished_is_skipped_and_what_failed_waits_to_be_asked_for():
    words = ["method=bias,prompt", "seed=0,1"]
    bad = {"seed=1": ("failed", 1)}
    started, summary = go(words, bad)
    assert len(started) == 4 and len(summary.done) == 2 and len(summary.failed) == 2
    text = summary.text()
    assert "2 done, 0 skipped" in text and "2 failed" in text and "failed: it broke" in text and "log.txt" in text
    started, summary = go(words, bad)
    assert not started and len(summary.skipped) == 2 and len(summary.failed) == 2 and "--retry-failed" in summary.text()
    started, summary = go(words, retry=True)
    assert (
        len(started) == 2
        and all("seed=1" in name for name in started)
        and len(summary.done) == 2
        and not summary.failed
    )
    started, _ = go(words, force=True)
    assert len(started) == 4


def test_a_run_that_is_killed_or_says_nothing_fails_alone_and_goes_on_the_next_time():
    ends = {"seed=0": ("interrupted", -9), "seed=1": ("oom", 1)}
    started, summary = go(["seed=0,1,2"], ends)
    assert len(started) == 3 and len(summary.done) == 1
    assert {line for _, line in summary.failed} == {"killed by signal 9", "oom: it broke"}
    started, summary = go(["seed=0,1,2"])
    assert len(started) == 1 and "seed=0" in started[0], "oom is a result; only the killed one goes on"


def test_after_the_first_failure_no_more_are_begun():
    started, summary = go(["seed=0,1,2,3"], {"seed=1": ("failed", 1)}, fail_fast=True)
    assert len(started) == 2 and len(summary.left) == 2 and "2 left" in summary.text()


def test_a_record_of_another_run_in_the_folder_does_not_count(capsys):
    planned = planning.plan(read_grid([*TINY, "seed=0,1"]))
    go(["seed=0,1"])
    one, two = (member.folder / "result.json" for member in planned.members)
    two.write_bytes(one.read_bytes())
    one.write_text("{half")
    assert [member.state() for member in planned.members] == ["new", "new"]
    said = capsys.readouterr().err
    assert f"{one}: can't be read (" in said and "to be trained anew" in said
    one.write_text("[" * 100_000)
    assert main(["sweep", *TINY, "seed=0,1", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "2 runs: 2 new" in said.out and f"{one}: can't be read (nested too deeply)" in said.err


def test_what_can_not_be_locked_or_written_stops_no_sweep(monkeypatch):
    go(["seed=0"])

    def readonly(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.FileLock, "acquire", readonly)
        started, summary = go(["seed=0"])
    assert not started and len(summary.skipped) == 1
    Path("runs").rename("before")
    (run,) = Path("before").glob("*/*/*/*")
    blocked = Path("runs").joinpath(*run.parts[1:])
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder should be")
    started, summary = go(["seed=0,1"])
    assert len(started) == 1 and len(summary.done) == 1 and "can't be written to" in summary.failed[0][1]


def test_a_replacement_that_was_broken_off_is_to_be_done():
    go(["seed=0"])
    (member,) = planning.plan(read_grid([*TINY, "seed=0"])).members
    assert member.state() == "done"
    begun = records.read_result(member.folder) | {"status": "interrupted"}
    records.write_result(run_folder.make_run_dir(member.folder / run_folder.NEXT), begun)
    assert member.state() == "interrupted"


@pytest.mark.parametrize(
    "make", [lambda log: os.mkfifo(log), lambda log: log.symlink_to("/dev/null")], ids=["pipe", "link"]
)
def test_a_log_is_a_file(tmp_path, make):
    make(tmp_path / "log.txt")
    with pytest.raises(OSError):
        local.open_log(tmp_path / "log.txt")


def test_a_report_that_would_replace_a_file_of_somebody_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["sweep", *TINY, f"sweep.report={tmp_path / 'thesis.tex'}"]) == 2
    assert "sweep.report=" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_run_of_another_process_is_waited_for():
    planned = planning.plan(read_grid([*TINY, "seed=0,1"]))
    member = run_folder.make_run_dir(planned.members[0].folder)
    launcher = Fake(planned)
    with run_folder.claimed(member):
        sweep = sweeps.Sweep(planned, launcher)
        assert [m.state() for m in planned.members] == ["running", "new"]
        assert len(sweep.busy) == 1 and len(sweep.todo) == 1
    summary = sweep()
    assert len(summary.done) == 2 and len(launcher.started) == 2, "freed without a result: it is taken up"


def test_a_gpu_takes_what_fits():
    local = Local(4, ["0", "1"], pack_mib=10_000)
    assert local.free({}, 7_000) == 0
    assert local.free({0: 7_000}, 900) == 1, "an idle one first"
    assert local.free({0: 7_000, 1: 9_000}, 900) == 2, "then GPU 0 again, with room for 3000"
    assert local.free({0: 7_000, 1: 9_000}, 3_000) == 2 and local.free({0: 7_000, 1: 9_000}, 3_001) is None
    assert local.free({0: None, 1: None}, 10) is None, "a run of which nothing is known has a GPU alone"
    apart = Local(2, ["3", "5"])
    assert (apart.free({}, None), apart.free({0: None}, None), apart.free({0: 1, 1: 1}, 1)) == (0, 1, None)


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for one GPU, as far as planning goes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 2 << 30})
    )


def test_an_automatic_batch_is_a_number_in_the_plan(gpu, monkeypatch, capsys):
    predicted = []

    def largest(config, available, predictor):
        predicted.append((config.method.name, available))
        return {"linear": 40, "bias": 20}[config.method.name]

    monkeypatch.setattr("s2a_cli.planner.batch_size.largest_batch", largest)
    words = [*TINY[:2], *TINY[4:], "quant=none", "seed=0,1"]
    planned = planning.plan(read_grid([*words, "method=linear,bias", "optim.batch_size=auto"]))
    batches = [(member.config.method.name, member.config.optim.batch_size) for member in planned.members]
    assert sorted(batches) == [("bias", 20), ("bias", 20), ("linear", 40), ("linear", 40)]
    assert predicted == [("linear", 2 << 30), ("bias", 2 << 30)], "once for all seeds"
    assert all("optim.batch_size=auto" not in member.command for member in planned.members)
    given = planning.plan(read_grid([*words, "optim.batch_size=20", "method=bias"]))
    run_folder = [member.folder for member in planned.members if member.config.method.name == "bias"]
    assert [member.folder for member in given.members] == run_folder, "a run is known by the number"
    assert capsys.readouterr().out.count("the largest that is predicted to fit") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.launcher=slurm"], "sweep.launcher=slurm the device is elsewhere.*s2a memory fit=8GiB"),
        (["sweep.launcher=ray"], "sweep.launcher=ray the device is elsewhere"),
        (["sweep.workers=2"], "several runs share one"),
        (["sweep.pack=true"], "several runs share one"),
    ],
)
def test_an_automatic_batch_needs_a_gpu_for_each_run(gpu, words, said):
    with pytest.raises(UserError, match=said):
        planning.plan(read_grid([*TINY[:2], *TINY[3:], "optim.batch_size=16,auto", *words]))


def test_an_automatic_batch_needs_a_gpu_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="optim.batch_size=auto: there is no CUDA device to fit; `s2a memory fit=8GiB`"):
        planning.plan(read_grid([*TINY[:2], *TINY[3:], "optim.batch_size=auto"]))


def test_a_dry_run_predicts_and_runs_nothing(capsys, tmp_path):
    assert main(["sweep", *TINY, "method=linear,bias", "quant=none,paper", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "predicted peak MiB" in said and "3 runs: 3 new" in said and "left out: method=linear quant=paper" in said
    assert not (tmp_path / "runs").exists()
    peaks = {
        line.split("  ")[0]: float(line.split()[3]) for line in said.splitlines() if line.startswith("method=bias")
    }
    assert peaks["method=bias quant=paper"] < peaks["method=bias quant=none"]


def test_a_setting_of_a_sweep_is_none_of_a_run(capsys):
    assert main(["train", "sweep.workers=2"]) == 2
    assert "sweep.workers=2: a setting of s2a sweep" in capsys.readouterr().err
    assert main(["sweep", "--dryrun"]) == 2
    assert "did you mean '--dry-run'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_as_a_user_runs_it(tmp_path):
    words = [*TINY, "method=bias", "optim.name=sgd", "optim.lr=0.01,1e30", "optim.warmup_epochs=0", "quant=none"]

    def sweep(*more):
        command = [sys.executable, "-m", "s2a_cli", "sweep", *words, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    first = sweep("sweep.workers=2")
    assert first.returncode == 1, first.stderr
    assert "1 done, 0 skipped (finished before), 1 failed" in first.stdout and "lower optim.lr" in first.stdout
    assert "done: optim.lr=0.01: top-1" in first.stderr
    log = next(line.strip() for line in first.stdout.splitlines() if line.endswith("log.txt"))
    assert "$ s2a train" in (tmp_path / log).read_text()
    second = sweep()
    assert second.returncode == 1 and "0 done, 1 skipped (finished before), 1 failed" in second.stdout
    table = subprocess.run([sys.executable, "-m", "s2a_cli", "table"], capture_output=True, text=True, cwd=tmp_path)
    assert table.returncode == 0 and "digits" in table.stdout


@pytest.mark.slow
def test_a_full_disk_breaks_nothing_and_the_same_line_goes_on_when_there_is_space(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.decode().strip()}")

    def sweep(folder):
        code = main(["sweep", *TINY, "method=bias", "optim.epochs=2", f"sweep.dir={folder}"])
        return code, capfd.readouterr().out

    try:
        code, said = sweep(disk)
        assert code == 1 and "No space left on device" in said and "make room" in said
        (record,) = disk.rglob("result.json")
        assert json.loads(record.read_text())["status"] == "interrupted"
        assert not list(disk.rglob(".*.????????"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        code, said = sweep(disk)
        assert code == 0 and "1 done" in said
        sweep(tmp_path / "runs")
        (tensors,) = disk.rglob("trainable.safetensors")
        assert tensors.read_bytes() == (tmp_path / "runs" / tensors.relative_to(disk)).read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
