"""Ctrl-C while the command line and torch are imported."""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import signal
import sys

import pytest

from s2a_cli.__main__ import main
from s2a_cli.cli.deferred import imports


@pytest.fixture(autouse=True)
def handled():
    """SIGINT as a shell's foreground job has it; a background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_import_can_not_swallow_it():
    reached = []
    with pytest.raises(KeyboardInterrupt), imports():
        with contextlib.suppress(BaseException):  # as some modules do around an import of theirs
            ctrl_c()
        reached.append("the end")
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_is_at_once():
    with pytest.raises(KeyboardInterrupt), imports():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_it_stays_ignored_where_it_is():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with imports():
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_before_the_command_line_is_there_it_is_one_line(monkeypatch, capsys):
    class Interrupted(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "s2a_cli.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "s2a_cli.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert main() == 130 and capsys.readouterr().err == "s2a: interrupted\n"
