"""Any bytes as an image, an archive or a folder: read, or refused in one line, soon, and nothing else changes."""

from __future__ import annotations

import fuzz_data
import pytest


@pytest.mark.parametrize("check", fuzz_data.DRAWN, ids=lambda check: check.__name__)
def test_whatever_is_given(check):
    fuzz_data.fuzz(check, 20, same=True)
