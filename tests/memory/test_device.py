"""CUDA devices that others use: who they are, and what a run does."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli import memory
from s2a_cli.cli.main import main
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import SweepConfig
from s2a_cli.memory import device as busy
from s2a_cli.memory.result import MIB
from s2a_cli.planner.batch_size import resolved
from s2a_cli.results import record
from s2a_cli.sweeps.launchers import local, make_launcher
from s2a_cli.training import trainer

SMALL = ["backbone=vit_t", "backbone.image_size=64", "dataset=cifar10", "method=full", "quant=none"]


class Gpus:
    """Two GPUs of 80,000 MiB; `used` MiB of each are held, by whom `says` tells in the words of nvidia-smi."""

    def __init__(self, monkeypatch, folder):
        self.used, self.folder, self.asked = [0, 0], folder, folder / "asked"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self.properties(device))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(busy, "PATIENCE", 0.0)
        monkeypatch.setattr(busy, "POLL", 0.01)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def info(self, device):
        return (80_000 - self.used[device.index or 0]) * MIB, 80_000 * MIB

    def properties(self, device):
        return type("Properties", (), {"uuid": f"0000-{device.index or 0}", "total_memory": 80_000 * MIB})

    def says(self, *lines, code=0, state="Disabled, 97"):
        """Makes nvidia-smi answer.

        lines: the processes that compute. state: whether a screen is drawn, and the share of time in which kernels run.
        """
        told = "".join(f"echo '{line}'\n" for line in lines)
        program = self.folder / "nvidia-smi"
        program.write_text(
            "#!/bin/sh\n" + f"exit_code={code}\n"
            f'case "$1" in *display_active*) echo "{state}"; exit $exit_code;; esac\n'
            f'echo "$@" > {self.asked}\n{told}exit $exit_code\n'
        )
        program.chmod(0o755)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    made = Gpus(monkeypatch, tmp_path)
    made.says()
    return made


def test_an_idle_device_is_not_refused(gpus):
    gpus.says("999, python, 500")
    assert memory.refusal("auto") is None and not gpus.asked.exists()
    gpus.used = [0, 9_000]
    assert memory.refusal("cuda") is None and memory.refusal("cuda:0") is None
    for other in ("cpu", "mps", "cuda:7"):  # not there: what chooses the device says so
        assert memory.refusal(other) is None


def test_without_cuda_nothing_is_busy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.refusal("auto") is None and memory.refusal("cuda") is None


def test_a_refusal_names_who_holds_the_device(gpus):
    gpus.used = [0, 9_000]
    gpus.says("4242, /usr/bin/python, train.py, 8123", "17, Xorg, [N/A]", f"{os.getpid()}, python, 300", "no process")
    said = str(memory.refusal("cuda:1"))
    assert said.startswith(
        "device=cuda:1 (NVIDIA Test) is not idle: process 4242 (/usr/bin/python, train.py, 8,123 MiB), process 17 (Xorg"
    )
    assert "MiB not known" in said and str(os.getpid()) not in said and "busy=allow" in said and "\n" not in said
    assert "-i GPU-0000-1" in gpus.asked.read_text()
    gpus.used = [9_000, 0]
    assert str(memory.refusal("auto")).startswith("device=cuda:0 ")


@pytest.mark.parametrize(
    "lines, code", [([], 0), (["Failed to initialize NVML: Unknown Error"], 9), (["No devices were found"], 0)]
)
def test_processes_that_nvidia_smi_does_not_show(gpus, lines, code):
    gpus.used = [5_120, 0]
    gpus.says(*lines, code=code)
    assert "5,120 MiB are held by processes that can't be seen from here" in str(memory.refusal("cuda"))


@pytest.mark.parametrize(
    "state, shares, lines, idle",
    [
        ("Enabled, 12", False, [], True),  # Xorg, a compositor, a browser: none of them computes
        ("Enabled, 12", False, ["4242, python, 900"], False),
        ("Disabled, 3", False, [], True),  # held, and nothing runs
        ("Disabled, 97", False, [], False),  # in another container, say
        ("[N/A], [N/A]", False, [], False),
        ("[N/A], [N/A]", True, [], True),  # memory of the host: what is held says nothing
        ("[N/A], [N/A]", True, ["4242, python, 900"], False),
    ],
)
def test_a_screen_and_memory_of_the_host_are_no_rivals(gpus, monkeypatch, capsys, state, shares, lines, idle):
    gpus.used = [1_100, 0]
    gpus.says(*lines, state=state)
    properties = gpus.properties
    monkeypatch.setattr(
        gpus, "properties", lambda device: type("P", (properties(device),), {"is_integrated": int(shares)})
    )
    found = memory.refusal("cuda")
    assert (found is None) == idle
    said = capsys.readouterr().err
    assert ("1,100 MiB of cuda are held by what does not compute" in said) == idle


def test_no_nvidia_smi_and_no_room_for_a_context(gpus, monkeypatch):
    gpus.used = [5_120, 0]
    monkeypatch.setenv("PATH", str(gpus.folder / "nothing"))
    assert "5,120 MiB" in str(memory.refusal("cuda"))

    def full(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    assert "all of its memory is held" in str(memory.refusal("cuda"))


def test_what_has_just_ended_is_waited_for(gpus, monkeypatch):
    monkeypatch.setattr(busy, "PATIENCE", 5.0)
    held = itertools.chain([9_000, 9_000], itertools.repeat(0))

    def info(device):
        return (80_000 - next(held)) * MIB, 80_000 * MIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    assert memory.refusal("cuda") is None


def test_a_run_is_refused_before_anything_is_loaded(gpus, monkeypatch, capsys):
    gpus.used = [9_000, 0]
    gpus.says("4242, python, 8123")
    reached = []

    def prepare(config):
        reached.append(config.device)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "prepare", prepare)
    assert main(["train", "device=cuda"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("s2a: device=cuda:0 (NVIDIA Test) is not idle: process 4242 (python, 8,123 MiB) holds")
        and said.count("\n") == 1
    )
    assert not reached
    for words in (["device=cuda", "busy=allow"], ["device=cuda:1"], ["device=cpu"]):
        assert main(["train", *words]) == 130
    assert reached == ["cuda", "cuda:1", "cpu"]
    assert main(["train", "busy=alow"]) == 2
    assert "did you mean 'allow'" in capsys.readouterr().err


def test_processes_of_one_run_do_not_refuse_each_other(gpus, monkeypatch):
    assert distributed.own_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert distributed.own_device("auto") == distributed.own_device("cuda") == f"cuda:{rank}"
        assert distributed.own_device("cuda:1") == ("cuda:1" if rank == "0" else None), "they share it"


@pytest.mark.parametrize(
    "workers, gpus, pack, devices, allowed",
    [
        (2, ["0", "1"], None, ["auto"], False),
        (3, ["0", "1"], None, ["auto"], True),
        (None, ["0"], 10_000, ["auto"], True),
        (2, ["0"], None, ["cpu"], False),
        (2, ["0", "1"], None, ["cuda:1"], True),
        (1, ["0", "1"], None, ["cuda:1"], False),
    ],
)
def test_runs_that_share_a_gpu_allow_each_other(monkeypatch, tmp_path, workers, gpus, pack, devices, allowed):
    started = []
    monkeypatch.setattr(local, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(local, "gpu_mib", lambda: pack)
    monkeypatch.setattr(local, "Process", lambda words, log, environment: started.append(words))
    on = make_launcher(SweepConfig(workers=workers, pack=bool(pack)), devices)
    for words in (["seed=0"], ["seed=0", "busy=refuse"]):
        on.start(words, tmp_path / "log.txt", 0)
    assert started == [["seed=0", *(["busy=allow"] if allowed else [])], ["seed=0", "busy=refuse"]]
    assert bool(on.note) == allowed


def test_it_is_no_part_of_what_a_run_computes():
    contents = {
        record.content(OmegaConf.to_container(compose([f"busy={word}"])), "r1", "w1") for word in ("refuse", "allow")
    }
    assert len(contents) == 1


def test_an_automatic_batch_is_for_cuda(gpus):
    with pytest.raises(UserError, match="not device=cpu"):
        resolved([*SMALL, "optim.batch_size=auto", "device=cpu"])


@pytest.mark.slow
def test_an_automatic_batch_fits_what_others_leave(gpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nothing but the figures is made up
    gpus.used = [78_000, 0]
    beside = resolved([*SMALL, "optim.batch_size=auto", "busy=allow"])[-1]
    assert "2,000 MiB that are free on cuda" in capsys.readouterr().out
    gpus.used = [0, 0]
    alone = resolved([*SMALL, "optim.batch_size=auto"])[-1]
    assert int(beside.partition("=")[2]) < int(alone.partition("=")[2])
    assert "80,000 MiB of cuda" in capsys.readouterr().out
