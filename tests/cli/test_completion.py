"""Shell completion: commands, then what each takes, with settings by Hydra."""

import os
import shutil
import subprocess
import sys

import pytest

from s2a_cli.cli.commands import COMMANDS
from s2a_cli.cli.completion import SCRIPTS, complete, script


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("s2a ", list(COMMANDS)),
        ("s2a t", ["train", "table"]),
        ("scripts/s2a va", ["validate"]),
        ("s2a train --d", ["--debug"]),
        ("s2a --debug tr", ["train"]),
        ("s2a ls da", ["datasets"]),
        ("s2a table fo", ["format=terminal", "format=md", "format=csv", "format=latex", "format=html"]),
        ("s2a table runs/", []),
        ("s2a eval run=runs/", []),
        ("s2a nothing ", []),
        ("s2a", []),
        ("", []),
        ("s2a train meth", ["method.", "method="]),
        ("s2a train method=si", ["method=side", "method=side_tuning"]),
        ("s2a validate quant=int4 method=prompt method.r", ["method.rank="]),
        (
            "s2a train method=s2a method.side.",
            [f"method.side.{key}=" for key in ("blocks", "grid", "heads", "lr_scale", "width")],
        ),
        ("s2a train dataset.shots=3 dataset.sh", ["dataset.shots="]),
        ("s2a train --debug precision=amp", ["precision=amp-bf16", "precision=amp-fp16"]),
        ("s2a train hydra", []),
        ("s2a train nonsense=1 method=nonsense optim.ep", ["optim.epochs="]),
    ],
)
def test_complete(line, expected):
    assert complete(line) == expected


def test_every_group_and_setting_is_offered():
    found = complete("s2a train ")
    assert {"backbone=", "dataset=", "method=", "optim=", "quant=", "optim.", "seed=", "precision=", "run_dir="} <= set(
        found
    )


def test_files_are_offered_behind_an_equals_sign(tmp_path):
    (tmp_path / "photos").mkdir()
    assert complete(f"s2a train dataset.root={tmp_path}/ph") == [f"dataset.root={tmp_path}/photos"]


def test_the_shells_ask_through_the_environment():
    line = "s2a train backbone=swin"
    done = subprocess.run(
        [sys.executable, "-m", "s2a_cli", "--complete"],
        env=os.environ | {"COMP_LINE": line},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["backbone=swin_b", "backbone=swin_t"] and done.returncode == 0


@pytest.fixture
def path(tmp_path):
    """Returns a PATH on which `s2a` is the one under test."""
    command = tmp_path / "s2a"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m s2a_cli "$@"\n')
    command.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_bash_replaces_what_follows_the_equals_sign(path):
    typed = "s2a train method=sid"
    commands = f"""
        {script("bash")}
        complete -p s2a
        COMP_LINE='{typed}' COMP_POINT={len(typed)} COMP_WORDS=(s2a train method = sid) COMP_CWORD=4
        _s2a 2>/dev/null
        printf '<%s>\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", commands], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    bound, *offered = done.stdout.splitlines()
    assert bound.endswith("-F _s2a s2a") and offered == ["<side>", "<side_tuning>"], done.stderr


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_read_by_their_shells(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, "-n"], input=script(shell), text=True, capture_output=True).returncode == 0


def test_fish_completes(path):
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    commands = script("fish") + "\ncomplete -C 's2a train backbone=swin'"
    done = subprocess.run(["fish", "-c", commands], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == ["backbone=swin_b", "backbone=swin_t"], done.stderr
