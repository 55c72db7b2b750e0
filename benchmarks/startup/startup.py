"""How soon s2a answers: help, refusals, the first line of a training, as a user waits for them.

    python benchmarks/startup/startup.py

Each command runs in a process of its own, the best of several; a first run of each, not counted, brings the files into
the system's cache. Beside the wall-clock time it says the CPU time, which another load on the machine changes less.
Writes startup.json and startup.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 5
OUT = Path(__file__).parent
ROOT = OUT.parents[1]
S2A = [sys.executable, "-m", "s2a_cli"]
# what is waited for -> the words, the exit code (None: the process is ended at its first line), the goal in seconds
COMMANDS: dict[str, tuple[list[str], int | None, float]] = {
    "help": (["train", "--help"], 0, 0.5),
    "a misspelt setting": (["train", "optim.lrr=1"], 2, 1),
    "a folder that is not there": (["train", "dataset=folder", "dataset.root=/no/such/folder"], 2, 1),
    "a checkpoint that is not there": (["train", "backbone.checkpoint=/no/such/file"], 2, 1),
    "a run that is not there": (["eval", "run=/no/such/run"], 2, 1),
    "a photo of a run that is not there": (["predict", "run=/no/such/run", "images=photo.jpg"], 2, 1),
    "photos that are not there, to begin with": (["init", "/no/such/folder"], 2, 1),
    "a data set without its folder": (["train", "dataset=folder"], 2, 1),
    "a folder that can't be a run's": (["train", "run_dir=/"], 2, 1),
    "a size without a unit": (["memory", "fit=8"], 2, 1),
    "a misspelt setting of a grid": (["sweep", "optim.lrr=1,2"], 2, 1),
    "a config that is right": (["validate"], 0, 1),
    "the first line of train": (["train", "experiment=smoke"], None, 2),
}


def answered(words: list[str], code: int | None, folder: Path) -> tuple[float, float]:
    """Returns the seconds until a command has answered, and the CPU seconds that it took.

    Raises RuntimeError for another exit code than `code`.
    """
    before, start = os.times(), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*S2A, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if code is None:
            process.stdout.readline()
            seconds = time.perf_counter() - start
            process.kill()
        process.stdout.read()
        process.wait()
        if code is not None:
            seconds = time.perf_counter() - start
            if process.returncode != code:
                raise RuntimeError(f"s2a {' '.join(words)} ended with {process.returncode}, not {code}")
    after = os.times()
    return seconds, after.children_user - before.children_user + after.children_system - before.children_system


def best(measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Returns the least time, and the least CPU time, of several rounds."""
    measure()
    seconds, cpu = zip(*(measure() for _ in range(ROUNDS)))
    return min(seconds), min(cpu)


def page(figures: dict) -> str:
    """Returns the page of the figures."""
    rows = []
    for name, one in figures["commands"].items():
        command, figure = f"`s2a {' '.join(COMMANDS[name][0])}`", f"{one['seconds']:.2f} | {one['cpu_seconds']:.2f}"
        rows.append(f"| {name} | {command} | {figure} | {one['goal']:g} |")
    return "\n".join(
        [
            "# How soon s2a answers",
            "",
            "Made by `python benchmarks/startup/startup.py` on"
            f" {figures['machine']}: the best of {ROUNDS} processes each,",
            f"with files in the system's cache. {figures['load']:.1f} other processes wanted one of {figures['cores']}"
            " cores at the start.",
            "",
            "| waited for | command | seconds | of the CPU | goal, on an idle machine |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measures and writes."""
    load, found = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (words, code, goal) in COMMANDS.items():
            seconds, cpu = best(lambda words=words, code=code: answered(words, code, Path(folder)))
            found[name] = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "goal": goal}
            print(f"{name:<32} {seconds:6.2f} s, {cpu:.2f} s of the CPU")
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    figures = {"machine": machine, "cores": os.cpu_count(), "load": round(load, 2), "commands": found}
    (OUT / "startup.json").write_text(json.dumps(figures, indent=2) + "\n")
    (OUT / "startup.md").write_text(page(figures))


if __name__ == "__main__":
    main()
