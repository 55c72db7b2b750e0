from __future__ import annotations

import functools
from typing import Any, cast

from torch import Tensor, nn

from s2a_cli.backbones import Block
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import Structure
from s2a_cli.methods.parts.thread_local import HandedOn
from s2a_cli.methods.res_tuning import ResAdapter, ResTuningSettings


class Bypass(nn.Module):
    """x_i = h_i + L_i(h_i) + x_(i-1) + V_i(x_(i-1)) for the hidden states h_i after each block, x_0 = h_0 before them.

    L_i (lateral) and V_i (vertical) are ResAdapters. What follows the last block, normalisation and head, reads x_n in
    place of h_n. All are Xavier-uniform, so x_n is not h_n at the start. A gradient reaches the h_i where something
    before them trains.
    Source: Res-Tuning-Bypass (arXiv 2310.19859), ResTuningBypassModule in swift/tuners/restuning.py of
    modelscope/swift, with tuner_cfg=res_adapter and the blocks of a ViT.
    """

    _x = HandedOn[Tensor | None](None)  # so far

    def __init__(self, blocks: list[Block], dim: int):
        super().__init__()
        self.input, self.outputs = blocks[0].input, [block.output for block in blocks]
        channels = self.input.channels
        self.lateral = nn.ModuleList(ResAdapter(channels, dim) for _ in blocks)
        self.vertical = nn.ModuleList(ResAdapter(channels, dim) for _ in blocks)

    def on_first_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begins with the hidden state before the first block. A pre-hook of it."""
        self._x = self.input.of((args, kwargs))

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Goes on by one block; the last one returns x. A hook of the block number `index`."""
        x, hidden = cast(Tensor, self._x), self.outputs[index]
        h = hidden.of(output)
        self._x = x = h + self.lateral[index](h) + x + self.vertical[index](x)
        if index + 1 < len(self.outputs):
            return output
        self._x = None
        return hidden.replaced(output, x.to(h.dtype))


class ResTuningBypass(Structure):
    """Res-Tuning-Bypass (arXiv 2310.19859): Res-Adapters in a chain beside the blocks; no gradient passes through these

    dim=10 is ours; the public code's default is 32. What trains in the blocks, of other structures or unfrozen later,
    learns through the chain.
    """

    Settings = ResTuningSettings
    adapts = False
    starts_pretrained = False
    families = ("vit",)

    def attach(self, backbone, beside=()):
        """Adds the chain beside the adapted blocks."""
        blocks = backbone.adapted_blocks(self.settings.blocks)
        states = {(state.layout, state.shape) for block in blocks for state in (block.input, block.output)}
        if len(states) > 1 or blocks[0].input.layout == "channels_first":
            raise self.misfit(backbone, "its hidden states are not all of one shape with the channels last")
        bypass = Bypass(blocks, self.settings.dim)
        blocks[0].module.register_forward_pre_hook(bypass.on_first_input, with_kwargs=True, prepend=True)
        for index, block in enumerate(blocks):
            block.module.register_forward_hook(functools.partial(bypass.on_block_output, index))
        backbone.add("res_tuning_bypass", bypass)
        return Attachment(
            backbone,
            adapts=False,
            unmergeable="a bypass stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = ResTuningBypass
