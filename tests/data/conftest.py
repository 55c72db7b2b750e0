from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_web import serve


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Keeps the tests from the user's own cache, and returns the folder that replaces it."""
    monkeypatch.setenv("S2A_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def real_data() -> Path:
    if not os.environ.get("S2A_REAL_DATA"):
        pytest.skip("S2A_REAL_DATA is not set: the folder of real photos")
    return Path(os.environ["S2A_REAL_DATA"])


@pytest.fixture
def web():
    with serve() as (url, paths):
        yield url, paths
