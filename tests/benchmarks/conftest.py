"""Puts the folders of the benchmarks that are tested on Python's path."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / name) for name in ("tiers", "cuda", "structures", "planner")]
