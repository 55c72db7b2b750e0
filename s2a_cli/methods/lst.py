from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.backbones import Block
from s2a_cli.config.schema import AT_LEAST_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.head_input import head_width
from s2a_cli.methods.parts.own_features import OwnFeatures, is_plain, mixed, summary
from s2a_cli.methods.parts.side_transformer import NarrowBlock, prune_into
from s2a_cli.methods.parts.thread_local import HandedOn


@dataclass
class LSTSettings(BlocksSettings):
    reduction: int = setting(8, help="the side network has the backbone's channels divided by this", rule=AT_LEAST_1)
    head_width: int = setting(
        8,
        help="channels of an attention head of the side network; more where the heads would not be even",
        rule=AT_LEAST_1,
    )
    temperature: float = setting(0.1, help="T of the gates sigmoid(alpha / T)", rule=POSITIVE)


class LadderSideNetwork(OwnFeatures):
    """A transformer of width C / r beside the backbone, whose block i reads s_i = mu_i s_(i-1) + (1 - mu_i) D_i h_i.

    h_i is the output of block i of the backbone, D_i a linear layer, mu_i = sigmoid(alpha_i / T), and s_0 = D_0 h_0 of
    the input h_0 of the first block. The head reads U norm(s) of the class token, U a linear layer to the width of the
    head; or of the mean of the tokens, where there is no class token. alpha = 0, so mu = 1/2; D and U as PyTorch
    initialises them.
    Source: LST (arXiv 2206.06522), sections 3.1 and 3.2; VL-T5/src/my_transformers/modeling_t5.py of
    ylsung/Ladder-Side-Tuning, with its biases and its last norm. That is for language; the numbers that are published
    for ViT-B/16 (2.38 million) are of such a network on it.
    The blocks begin as pruned blocks of the backbone (section 3.3), where these have the layers of a plain ViT. Rows
    are kept by their L1 norm, where the source takes the Fisher information, which needs data; and as many of each
    attention head, as in its third version.
    """

    _state = HandedOn[Tensor | None](None)  # [B, N, width], from the first block's input to the last one's output

    def __init__(self, blocks: Sequence[Block], settings: LSTSettings, features: int):
        super().__init__()
        channels = blocks[0].input.channels
        width = max(1, channels // settings.reduction)
        heads = next(n for n in range(max(1, width // settings.head_width), 0, -1) if width % n == 0)
        self.states, self.temperature = [(block.input, block.output) for block in blocks], settings.temperature
        self.first = nn.Linear(channels, width)
        self.downs = nn.ModuleList(nn.Linear(channels, width) for _ in blocks)
        self.gates = nn.Parameter(torch.zeros(len(blocks)))
        narrow = [NarrowBlock(width, 4 * width, heads) for _ in blocks]
        self.blocks = nn.ModuleList(narrow)
        self.norm, self.up = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, features)
        kept = None
        for mine, block in zip(narrow, blocks):
            kept = prune_into(mine, block, kept)

    def on_first_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begins the side state with what the first block is about to read. A hook of that block."""
        hidden = self.states[0][0]
        self._state = self.first(hidden.of((args, kwargs)))

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """Takes the side state past block `index`. A hook of that block."""
        (state, self._state), hidden = (self._state, None), self.states[index][1]
        assert state is not None, "the first block has been called"
        read = self.downs[index](hidden.of(output))
        mu = torch.sigmoid(self.gates[index] / self.temperature)
        state = self.blocks[index](mixed(read, state, mu))
        if index < len(self.states) - 1:
            self._state = state
        else:
            self.hand_over(self.up(summary(hidden, self.norm(state))))


class LST(Structure):
    """LST (arXiv 2206.06522): a narrow transformer beside the backbone reads its blocks, and the head reads that

    Nothing detaches the hidden states: alone, no gradient passes through the backbone as nothing in it trains, and a
    structure beside it learns through the ladder.
    """

    Settings = LSTSettings
    adapts = False
    starts_pretrained = False
    families = ("vit",)
    published = Published(2.38, "V-PETL Bench, README: VTAB-1k")

    def attach(self, backbone, beside=()):
        """Adds a ladder side network beside the adapted blocks."""
        blocks = backbone.adapted_blocks(self.settings.blocks)
        if not is_plain(blocks):
            raise self.misfit(backbone, "its hidden states are no tokens of one shape throughout")
        network = LadderSideNetwork(blocks, self.settings, head_width(backbone))
        blocks[0].module.register_forward_pre_hook(network.on_first_input, with_kwargs=True, prepend=True)
        for index, block in enumerate(blocks):
            block.module.register_forward_hook(functools.partial(network.on_block_output, index))
        network.replace_features(backbone)
        backbone.add("lst", network)
        return Attachment(
            backbone,
            adapts=False,
            unmergeable="a side network stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = LST
