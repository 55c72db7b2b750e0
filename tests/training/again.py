"""Tests a finished run again, as `s2a eval` does."""

from __future__ import annotations

from s2a_cli.training import testing
from s2a_cli.training.trained import load_as


def figures_again(config, folder):
    """The figures on its own test split."""
    labelled = testing.own_test(folder, config)
    return testing.evaluate(load_as(folder, config), labelled).figures()
