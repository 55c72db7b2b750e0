"""Ctrl-C, SIGTERM and the end of a parent process, as things that long work can ask about."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

PARENT = "S2A_PARENT"  # environment: the sweep's process; a run whose sweep is gone saves where it is and ends
Batch = TypeVar("Batch")


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C and SIGTERM wait for the end of a step; yields what tells that one came. A second one ends it at
    once.

    The end of the sweep that started this process counts as one: nobody would know that it goes on.
    """
    came, parent = threading.Event(), os.environ.get(PARENT)

    def asked() -> bool:
        return came.is_set() or (parent is not None and os.getppid() != int(parent))

    def stop(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def guarded(loader: Iterable[Batch], asked: Callable[[], bool]) -> Iterator[Batch]:
    """The batches. Raises KeyboardInterrupt when the next one does not come because of a Ctrl-C."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:  # Ctrl-C reaches the processes that load images, too
            if asked():
                raise KeyboardInterrupt from None
            raise
        yield batch
        del batch
