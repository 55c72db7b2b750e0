"""stdout and stderr that are closed, gone, or lack characters: a training goes on whatever it can't print."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import s2a_cli
from s2a_cli.common import streams

# A training in miniature, so that no test waits for torch: it speaks on all ways, before and after its terminal is
# gone.
SCRIPT = """
import dataclasses, sys, time
from pathlib import Path
from s2a_cli.cli.main import main
from s2a_cli.common.progress import Progress
from s2a_cli.cli.commands import COMMANDS

def train(words):
    with Progress("training", 2, " images") as progress:
        for step in range(2):
            print("step ± ≈", step, flush=True)
            progress.add(1, loss="0.1 ±")
            progress.note("epoch ± done")
            print("s2a: a warning ±", file=sys.stderr)
            Path("begun").touch()
            while len(sys.argv) > 1 and not Path("gone").exists():
                time.sleep(0.01)
    print("90.00 ± 0.10")
    Path("done").touch()
    return 0

COMMANDS["train"] = dataclasses.replace(COMMANDS["train"], run=train)
code = main(["train"])
Path("code").write_text(str(code))
sys.exit(code)
"""
ENVIRONMENT = {"PYTHONPATH": str(Path(s2a_cli.__file__).parents[1])}


def command(tmp_path, *more):
    (tmp_path / "script.py").write_text(SCRIPT)
    return [sys.executable, "script.py", *more]


def ended_well(tmp_path):
    return (tmp_path / "done").exists() and (tmp_path / "code").read_text() == "0"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2> /dev/full"])
def test_streams_that_are_closed_or_full(tmp_path, closed):
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *command(tmp_path)],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended_well(tmp_path) and done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_an_encoding_without_our_characters(tmp_path):
    environment = os.environ | ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(tmp_path), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and ended_well(tmp_path), done.stderr
    assert "step \\xb1 \\u2248 1" in done.stdout and "warning \\xb1" in done.stderr


def test_a_pipe_that_breaks_while_a_training_goes_on(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "wait"),
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout.readline()
    process.stdout.close()
    (tmp_path / "gone").touch()
    assert process.wait(120) == 0 and ended_well(tmp_path)


def test_a_terminal_that_is_closed_while_a_training_goes_on(tmp_path):
    pty = pytest.importorskip("pty")
    child, terminal = pty.fork()  # the terminal is the child's own: its end is a SIGHUP, too
    if not child:
        os.chdir(tmp_path)
        words = command(tmp_path, "wait")
        os.execve(words[0], words, os.environ | ENVIRONMENT)
    while not (tmp_path / "begun").exists():
        if select.select([terminal], [], [], 0.05)[0]:  # it may have begun since, and say no more
            os.read(terminal, 4096)
    os.close(terminal)
    (tmp_path / "gone").touch()
    assert os.waitpid(child, 0)[1] == 0 and ended_well(tmp_path)


def test_a_disk_that_has_room_again_is_written_to_again():
    class Disk(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    stream = streams.Unfailing(disk)
    assert stream.write("lost") == 4
    disk.full = False
    stream.write("kept")
    assert disk.getvalue() == "kept"


def test_a_closed_terminal_ends_other_commands_as_before():
    before = signal.getsignal(signal.SIGHUP)
    with streams.unfailing():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == before
