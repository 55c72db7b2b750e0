"""Short fuzzers of command lines and of checkpoint files; benchmarks run the same for longer."""

from __future__ import annotations

import fuzz_inputs
import pytest
from hypothesis import HealthCheck, event, given, settings

SHORT = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def test_no_command_line_ends_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @SHORT
    @given(fuzz_inputs.command_lines())
    def every(line):
        fuzz_inputs.check_words(line)

    every()


@pytest.mark.filterwarnings("ignore")
def test_no_file_of_tensors_ends_in_a_traceback(tmp_path):
    read = []

    @settings(SHORT, max_examples=300)
    @given(fuzz_inputs.files())
    def every(file):
        read.append(fuzz_inputs.check_file(tmp_path, *file))
        event(f"{file[0]}: {'read' if read[-1] else 'refused'}")

    every()
    assert 10 < sum(read) < len(read) - 10, "both files that are read and files that are refused were tried"
