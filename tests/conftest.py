"""What all tests share: no model hub, real photos and weights where they are, and results as runs write them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from example_result import result

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a download is a mistake
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared by the processes of pytest-xdist

import s2a_cli.methods  # noqa: F401 (behind OMP_NUM_THREADS, which torch reads once)


def pytest_collection_modifyitems(items):
    """Slow ones first: what is left at the end is short, and no core waits long for another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def real_data() -> Path:
    """The folder of real photos and weights."""
    if not os.environ.get("S2A_REAL_DATA"):
        pytest.skip("S2A_REAL_DATA is not set: the folder of real photos")
    return Path(os.environ["S2A_REAL_DATA"])


@pytest.fixture(autouse=True)
def without_a_measured_pace(monkeypatch, request):
    """Runs do not measure how fast they are, which has tests of its own."""
    if "predicts" not in request.keywords:
        from s2a_cli.training import duration

        some = duration.Duration(7.0, "1 epoch", duration.Pace(0.0, 0.01, 0.01, 2), [])
        monkeypatch.setattr(duration, "predict", lambda run, done=0: some)


@pytest.fixture
def set_chunk_sizes(monkeypatch):
    """set_chunk_sizes(block=1) changes a ChunkSizes for every device."""
    from s2a_cli.activations.chunk_sizes import BY_DEVICE

    def change(**sizes):
        for device, known in BY_DEVICE.items():
            monkeypatch.setitem(BY_DEVICE, device, replace(known, **sizes))

    return change


@pytest.fixture
def quick_plans(monkeypatch):
    """Plans that measure for a moment: the search is the same."""
    from s2a_cli.planner import measure, plan

    monkeypatch.setattr(measure, "SECONDS", 0.2)
    monkeypatch.setattr(plan, "FINAL_SECONDS", 0.2)


@pytest.fixture
def make_result():
    return result


@pytest.fixture
def write_result(tmp_path):
    """write_result(folder name, **arguments of make_result) writes one under tmp_path / "runs"."""

    def write(name: str, **kwargs) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result(**kwargs)))
        return folder

    return write
