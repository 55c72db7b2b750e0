"""The wheel, installed elsewhere and run from another folder: conf/ and the embedded weights are in it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*argv, **kwargs):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Returns (environment, another folder) with the wheel's content first on Python's path."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []  # isolated, build needs a network
    built = python("-m", "build", "--wheel", *isolation, "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    target, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir()
    done = python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    return os.environ | {"PYTHONPATH": str(target)}, elsewhere


@pytest.mark.slow
def test_the_wheel_brings_its_configs_and_trains(installed):
    environment, elsewhere = installed
    where = python("-c", "import s2a_cli; print(s2a_cli.__file__)", env=environment, cwd=elsewhere).stdout
    assert where.startswith(environment["PYTHONPATH"])
    listed = python("-m", "s2a_cli", "ls", env=environment, cwd=elsewhere)
    assert listed.returncode == 0 and "vit_micro" in listed.stdout and "small_gpu" in listed.stdout, listed.stderr
    trained = python("-m", "s2a_cli", "train", "experiment=smoke", "device=cpu", env=environment, cwd=elsewhere)
    assert trained.returncode == 0, trained.stderr
    (record,) = elsewhere.glob("runs/*/*/*/*/result.json")
    assert json.loads(record.read_text())["status"] == "ok"
