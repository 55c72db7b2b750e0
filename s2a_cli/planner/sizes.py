"""Sizes as users write them: of memory, and the batch that fits it."""

from __future__ import annotations

import re

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import SIZE

AUTO = "optim.batch_size=auto"
UNITS = {"MiB": 2**20, "GiB": 2**30}


def size(key: str, text: str) -> int:
    """Returns the bytes of `8GiB` or `512MiB`. Raises UserError, which names the units, for anything else."""
    match = re.fullmatch(SIZE, text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"{key}={text}: expected a size above 0 in MiB or GiB (2^20 or 2^30 bytes), such as {key}=8GiB")
    return round(float(match[1]) * UNITS[match[2]])
