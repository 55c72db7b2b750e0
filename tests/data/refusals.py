"""Returns what bad input is refused with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import folder_config

from s2a_cli.common.errors import UserError
from s2a_cli.data import load


def refusal(call, *args, **kwargs) -> str:
    """Returns the message of the UserError that a call raises, which is one line."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def folder_refusal(root: Path, **settings) -> str:
    """Returns the message with which a folder of images is refused."""
    return refusal(load, folder_config(root, **settings))
