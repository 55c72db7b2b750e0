from __future__ import annotations

from dataclasses import dataclass

from s2a_cli.methods.base import Method


class Linear(Method):
    """Linear probe: the classification head alone."""

    @dataclass
    class Config(Method.Config):
        pass

    def attach(self, backbone):
        pass


METHOD = Linear
