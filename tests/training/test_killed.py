"""kill -9 at random moments of trainings, sweeps, cached features, and of a repetition of a finished run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = os.environ.get("S2A_KILLS", "2")  # 40 for a thorough look


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forks")
def test_kill_9_loses_nothing_that_is_finished(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), KILLS, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing that was finished was lost" in done.stdout and "re-run over a finished run" in done.stdout
