from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.head_input import head_width
from s2a_cli.methods.parts.own_features import OwnFeatures, is_plain, mixed, summary
from s2a_cli.methods.parts.side_transformer import NarrowBlock
from s2a_cli.methods.parts.thread_local import HandedOn


@dataclass
class QSTSettings(BlocksSettings):
    reduction: int = setting(16, help="the side network has the backbone's channels divided by this", rule=AT_LEAST_1)
    rank: int = setting(16, help="of the maps by which hidden states are made narrow", rule=AT_LEAST_1)
    heads: int = setting(
        12, help="attention heads of the side network; fewer where they would not be even", rule=AT_LEAST_1
    )


class Downsample(nn.Module):
    """D(h) = LayerNorm(B SiLU(A h)): from C channels through `rank` to the side network's width; no biases."""

    def __init__(self, channels: int, rank: int, width: int):
        super().__init__()
        self.A, self.B = nn.Linear(channels, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.act, self.norm = nn.SiLU(), nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.B(self.act(self.A(h))))


class SideNetwork(OwnFeatures):
    """A narrow transformer whose block i reads z_i s_(i-1) + (1 - z_i) D_i(h_i), of the detached output h_i of a block.

    z_i = sigmoid(gate_i) for each channel, gate_i = 1/2; s_0 = D_1(h_0) of the input h_0 of the first block, by the
    same map as h_1. The head reads z x + (1 - z) U norm(s), x the backbone's own feature, z = sigmoid(gate), gate = 1
    for each channel: at the start 0.73 of it is x. All layers as PyTorch initialises them.
    """

    _state = HandedOn[Tensor | None](None)  # [B, N, width], from the first block's input to the last one's output

    def __init__(self, blocks: Sequence[Block], settings: QSTSettings, features: int):
        super().__init__()
        channels = blocks[0].input.channels
        width = max(1, channels // settings.reduction)
        heads = next(n for n in range(min(width, settings.heads), 0, -1) if width % n == 0)
        self.states = [(block.input, block.output) for block in blocks]
        self.downs = nn.ModuleList(Downsample(channels, settings.rank, width) for _ in blocks)
        self.gates = nn.ParameterList(torch.full((width,), 0.5) for _ in blocks)
        self.blocks = nn.ModuleList(NarrowBlock(width, 4 * width, heads) for _ in blocks)
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, features)
        self.gate = nn.Parameter(torch.ones(features))

    def on_first_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begins the side state with what the first block is about to read. A hook of that block."""
        self._state = self.downs[0](self.states[0][0].of((args, kwargs)).detach())

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """Takes the side state past block `index`. A hook of that block."""
        (state, self._state), hidden = (self._state, None), self.states[index][1]
        assert state is not None, "the first block has been called"
        read = self.downs[index](hidden.of(output).detach())
        state = self.blocks[index](mixed(read, state, torch.sigmoid(self.gates[index])))
        if index < len(self.states) - 1:
            self._state = state
        else:
            self.hand_over(self.up(self.norm(summary(hidden, state))))

    def on_head_input(self, head: nn.Module, args: tuple) -> tuple:
        """Mixes what a layer of the head is about to read with what the side network has found. A hook of the layer."""
        side, *others = super().on_head_input(head, args)
        return (mixed(side, args[0], torch.sigmoid(self.gate)), *others)


class QST(Structure):
    """QST (arXiv 2401.07004): a narrow transformer beside a backbone in 4 bits reads its hidden states, made narrow

    Run it with `backbone.weights=nf4`, the 4-bit weights of the source.
    Source: YouAreSpecialToMe/QST, QSTConfig.py and modeling_llama_qst.py, for language models; reduction 16, rank 16
    and SiLU are those of its glue_qst.py, whose dropout of 0.1 its code leaves out.
    Departures: a ViT takes the place of the language model, and blocks of its kind (LayerNorm, GELU, 4 times as wide
    within) that of theirs; the class token, or the mean of the tokens, is what the head reads of the side state.
    The paper's gate of the two features begins at the backbone's alone; theirs, and ours, at sigmoid(1).
    """

    Settings = QSTSettings
    adapts = False
    starts_pretrained = False
    families = ("vit",)

    def attach(self, backbone, beside=()):
        """Adds a side network beside the adapted blocks."""
        blocks = backbone.adapted_blocks(self.settings.blocks)
        if not is_plain(blocks):
            raise self.misfit(backbone, "its hidden states are no tokens of one shape throughout")
        network = SideNetwork(blocks, self.settings, head_width(backbone))
        blocks[0].module.register_forward_pre_hook(network.on_first_input, with_kwargs=True, prepend=True)
        for index, block in enumerate(blocks):
            block.module.register_forward_hook(functools.partial(network.on_block_output, index))
        network.replace_features(backbone)
        backbone.add("qst", network)
        return Attachment(
            backbone,
            adapts=False,
            unmergeable="a side network stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = QST
