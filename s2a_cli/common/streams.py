"""Copes with a stdout or stderr that is closed, on a terminal that is gone, or in an encoding that lacks characters.

A command that only prints ends when it can't write, as `s2a ls | head -1` should. A training goes on, and what it
prints is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk, which may have room again later


def opened() -> None:
    """Opens stdout and stderr on the null device where they are closed (`2>&-`).

    Otherwise the next file that is opened would be taken for them. Characters that their encoding lacks become escapes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
        elif mode == "w" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


class Unfailing:
    """A stream to which every write succeeds: once its other end is gone, what is written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def end(self) -> None:
        """Writes what waits in the buffer, or drops it: Python's own last flush would end the process with an error."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere(self._stream)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in FULL:
            with contextlib.suppress(OSError, ValueError):
                nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def nowhere(stream: TextIO) -> None:
    """Drops what waits in the stream's buffer, and all that is written to it from now on."""
    handle = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(handle, stream.fileno())
    finally:
        os.close(handle)


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Makes every write to stdout and stderr succeed, and a terminal that is closed end nothing, as under nohup."""
    with contextlib.ExitStack() as stack:
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
            stack.callback(signal.signal, signal.SIGHUP, before)
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            wrapped = Unfailing(stream)
            stack.callback(wrapped.end)
            stack.enter_context(redirect(wrapped))
        yield
