"""Turns Ctrl-C, SIGTERM and the end of the parent process into a question that long work asks between its steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

PARENT = "S2A_PARENT"  # variable with the id of the sweep's process: a run whose sweep is gone saves and ends
Batch = TypeVar("Batch")


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C and SIGTERM wait for the end of a step. Yields a function that tells whether one came.

    A second signal raises KeyboardInterrupt at once. The end of the sweep that started this process counts as a signal,
    as nobody would know that the run goes on.
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


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Makes Ctrl-C wait for the end of a block, such as an import that may catch KeyboardInterrupt and go on half done.

    A second one raises it at once. Leaves SIGINT alone where something else handles or ignores it.
    """
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came.is_set():
            raise KeyboardInterrupt


def guarded(loader: Iterable[Batch], asked: Callable[[], bool]) -> Iterator[Batch]:
    """Yields the batches. Raises KeyboardInterrupt where a Ctrl-C ended the processes that load them."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:  # Ctrl-C also reaches the processes that load images
            if asked():
                raise KeyboardInterrupt from None
            raise
        yield batch
        del batch
