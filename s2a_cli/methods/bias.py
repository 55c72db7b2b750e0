from __future__ import annotations

from s2a_cli.backbones import Backbone
from s2a_cli.methods.base import Method


def tune_biases(backbone: Backbone, blocks: str) -> None:
    """Unfreezes every bias vector of the adapted blocks: of Linear, Conv and normalisation layers alike."""
    for _, module in backbone.adapted_modules(blocks):
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or name.endswith("_bias"):  # EVA and BEiT keep q_bias and v_bias as vectors of their own
                parameter.requires_grad_(True)


class Bias(Method):
    """bias tuning (BitFit, arXiv 2106.10199): every bias vector; its gradient needs no activation"""

    Config = Method.BlocksConfig

    def attach(self, backbone):
        tune_biases(backbone, self.config.blocks)


METHOD = Bias
