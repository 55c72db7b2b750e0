"""scripts/s2a and scripts/test in a checkout of their own, with a stand-in for Python that installs nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = r"""#!/bin/bash
# -c: the version check; -m venv DIR; -m pip install: makes the console script
log="$(dirname "$CALLS")/calls"
echo "$*" >>"$log"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip")
        [[ -e $FAIL ]] && { echo "no network" >&2; exit 1; }
        printf '#!/bin/bash\necho "s2a $PWD" "$@"\n' >"$(dirname "$0")/s2a"; chmod +x "$(dirname "$0")/s2a" ;;
    "-m pytest") echo "pytest $PWD" "${@:3}" ;;
esac
exit 0
"""


class Checkout:
    def __init__(self, folder: Path):
        self.root, self.bin, self.calls, self.fail = (
            folder / "check out",
            folder / "bin",
            folder / "calls",
            folder / "fail",
        )
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("s2a", "test", "venv.sh"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.python = self.bin / "python3.12"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        for tool in ("bash", "dirname", "readlink", "head", "cksum", "mkdir", "rm", "cp", "chmod"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stamp = self.root / ".venv" / "s2a-stamp"

    def run(self, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        environment = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls),
            "FAIL": str(self.fail),
            "HOME": os.environ["HOME"],
        }
        return subprocess.run(argv, cwd=cwd or self.bin, env=environment, capture_output=True, text=True)

    def s2a(self, *words: str, **kwargs) -> subprocess.CompletedProcess:
        return self.run(str(self.root / "scripts" / "s2a"), *words, **kwargs)

    def installs(self) -> int:
        return self.calls.read_text().count("pip install") if self.calls.exists() else 0


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_first_call_installs_and_the_second_does_not(checkout):
    first = checkout.s2a("train", "run_dir=a b")
    assert first.returncode == 0 and first.stdout == f"s2a {checkout.bin} train run_dir=a b\n"
    assert "installing into" in first.stderr and checkout.installs() == 1
    calls = checkout.calls.read_text()
    second = checkout.s2a("ls")
    assert second.stdout == f"s2a {checkout.bin} ls\n" and second.stderr == ""
    assert checkout.calls.read_text() == calls, "the second call starts no Python but s2a's own"


def test_through_a_link_and_from_another_folder(checkout, tmp_path):
    link = tmp_path / "bin" / "s2a"
    link.symlink_to(checkout.root / "scripts" / "s2a")
    assert checkout.run(str(link), "ls", cwd=tmp_path).stdout == f"s2a {tmp_path} ls\n"


def test_a_half_made_venv_is_made_again(checkout):
    checkout.fail.touch()
    failed = checkout.s2a("ls")
    assert failed.returncode == 1 and "no network" in failed.stderr and "the next call starts it again" in failed.stderr
    left = checkout.root / ".venv" / "left-over"
    left.touch()
    checkout.fail.unlink()
    assert checkout.s2a("ls").returncode == 0 and not left.exists()


def test_a_changed_pyproject_installs_again_into_the_same_venv(checkout):
    checkout.s2a("ls")
    kept = checkout.root / ".venv" / "kept"
    kept.touch()
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 's2a'\n")
    assert checkout.s2a("ls").returncode == 0
    assert checkout.installs() == 2 and kept.exists()


def test_a_moved_checkout_is_installed_anew(checkout):
    checkout.s2a("ls")
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    assert checkout.s2a("ls").returncode == 0 and checkout.installs() == 2


def test_a_venv_made_by_hand_is_not_deleted(checkout):
    mine = checkout.root / ".venv" / "mine"
    mine.parent.mkdir()
    mine.touch()
    assert checkout.s2a("ls").returncode == 0 and mine.exists() and checkout.installs() == 1


def test_no_python(checkout):
    checkout.python.unlink()
    failed = checkout.s2a("ls")
    assert failed.returncode == 1 and "Python >= 3.11" in failed.stderr
    assert not (checkout.root / ".venv").exists()


def test_scripts_test_passes_its_arguments_on(checkout):
    done = checkout.run(str(checkout.root / "scripts" / "test"), "-k", "a or b")
    assert done.returncode == 0 and re.fullmatch(rf"pytest {checkout.root} -n auto .*-k a or b\n", done.stdout)


def test_scripts_are_executable_and_read_by_bash():
    for script in ("scripts/s2a", "scripts/test", ".ci/run"):
        path = ROOT / script
        assert os.access(path, os.X_OK), script
        assert path.read_text().startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in path.read_text()
        assert subprocess.run(["bash", "-n", path]).returncode == 0
