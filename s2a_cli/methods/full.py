from __future__ import annotations

from s2a_cli.methods.base import Method


class Full(Method):
    """full fine-tuning: every parameter of the adapted blocks (all by default), and their BatchNorms' statistics"""

    Config = Method.BlocksConfig

    def attach(self, backbone):
        for _, module in backbone.adapted_modules(self.config.blocks):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


METHOD = Full
