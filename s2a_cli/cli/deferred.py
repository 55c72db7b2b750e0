"""Imports that a command defers until it needs them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from s2a_cli.common.interrupts import held


@contextmanager
def imports() -> Iterator[None]:
    """Stops the garbage collector for imports of torch, and lets Ctrl-C wait for their end.

    The collector would look through a million new objects again and again, which takes a second.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with held():
            yield
    finally:
        gc.freeze()  # what is there now stays
        atexit.register(gc.unfreeze)  # modules are to be taken down as ever
        if was_on:
            gc.enable()
