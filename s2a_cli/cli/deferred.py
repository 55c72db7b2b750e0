"""Imports that a command defers until it needs them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Stops the garbage collector for imports of torch.

    It would look through a million new objects again and again, which takes a second.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is there now stays
        atexit.register(gc.unfreeze)  # modules are to be taken down as ever
        if was_on:
            gc.enable()
