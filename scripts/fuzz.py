"""Feeds random and damaged input of every kind to the program, as the tests do, but as much of it as wanted.

    python scripts/fuzz.py [COUNT=2000] [KIND ...]

The kinds are lines (of the command line), tensors (checkpoint files), records (and metrics), and images, archives and
folders of data. Stops with the smallest input that ends in a traceback, a hang or a changed file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), *(str(TESTS / folder) for folder in ("data", "config", "results"))]
import fuzz_data
import fuzz_inputs
import fuzz_records
from hypothesis import HealthCheck, given, settings


def lines(count: int) -> None:
    """Checks `count` command lines."""
    _drawn(count)(given(fuzz_inputs.command_lines())(fuzz_inputs.check_words))()


def tensors(count: int) -> None:
    """Checks `count` checkpoint files."""
    with tempfile.TemporaryDirectory() as folder:

        def one(file: tuple[str, bytes]) -> None:
            fuzz_inputs.check_file(Path(folder), *file)

        _drawn(count)(given(fuzz_inputs.files())(one))()


def _drawn(count: int) -> settings:
    checks: list[Any] = list(HealthCheck)
    return settings(max_examples=count, deadline=None, suppress_health_check=checks, database=None)


KINDS = {"lines": lines, "tensors": tensors, "records": fuzz_records.fuzz}
KINDS |= {f"{check.__name__.removeprefix('check_')}s": partial(fuzz_data.fuzz, check) for check in fuzz_data.DRAWN}


def main(words: list[str]) -> None:
    count = int(words.pop(0)) if words and words[0].isdigit() else 2000
    if odd := [word for word in words if word not in KINDS]:
        sys.exit(f"{odd[0]}: expected one of {', '.join(KINDS)}")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["S2A_DATA"] = folder
        for kind in words or KINDS:
            began = time.monotonic()
            KINDS[kind](count)
            print(f"{kind}: {count} inputs in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
