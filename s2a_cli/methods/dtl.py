from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Backbone, Block
from s2a_cli.config.rules import number
from s2a_cli.config.schema import AT_LEAST_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.thread_local import HandedOn

UP_TO_1 = number("a number above 0, at most 1", lambda value: 0 < value <= 1)


class CompactSideNetwork(nn.Module):
    """Side state of blocks of one shape: s_i = s_(i-1) + B_i A_i x_i for the input x_i of block i, A [r, C], B [C, r].

    After the blocks numbered from `first` on, y = h + swish(s_i), where swish(s) = s * sigmoid(beta s), enters the next
    block in place of the output h. As nothing below changes, gradients end at the first such block: of the blocks
    before it only x_i is kept, for A_i. A is Kaiming uniform, B = 0, so that y = h at the start.
    Source: DTL (arXiv 2312.07856), section 3, models/vision_transformer.py and models/swin_transformer.py of
    heekhero/DTL. There s * sigmoid(beta s) keeps two tensors; silu(beta s) / beta is the same and keeps one.
    """

    _state = HandedOn[Tensor | None](None)  # [B, N, C], from the first block's input to the last one's output

    def __init__(self, blocks: Sequence[Block], first: int, rank: int, beta: float):
        super().__init__()
        self.states, self.first, self.beta = [(block.input, block.output) for block in blocks], first, beta
        channels = blocks[0].input.channels
        self.downs = nn.ModuleList(nn.Linear(channels, rank, bias=False) for _ in blocks)
        self.ups = nn.ModuleList(nn.Linear(rank, channels, bias=False) for _ in blocks)
        for up in self.ups:
            nn.init.zeros_(up.get_parameter("weight"))

    def on_block_input(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Adds to the side state what block `index` is about to read. A hook of that block."""
        hidden = self.states[index][0]
        read = self.ups[index](self.downs[index](hidden.to_tokens(hidden.of((args, kwargs)))))
        self._state = read if index == 0 or self._state is None else self._state + read

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Adds the side state to what block `index` returns, if it is one of those. A hook of that block."""
        state, hidden = self._state, self.states[index][1]
        if index == len(self.states) - 1:
            self._state = None
        if index < self.first or state is None:
            return output
        h = hidden.of(output)
        return hidden.replaced(output, h + hidden.from_tokens(self.fused(F.silu(self.beta * state) / self.beta)).to(h))

    def fused(self, state: Tensor) -> Tensor:
        """Returns what is added to a block's output for the side state after its swish, both [B, N, C]."""
        return state


@dataclass
class DTLSettings(BlocksSettings):
    rank: int = setting(2, help="of the linear map by which the side state reads the input of a block", rule=AT_LEAST_1)
    beta: float = setting(100.0, help="of the swish through which the side state is added", rule=POSITIVE)
    share: float = setting(
        0.5, help="of these blocks, the last ones: their outputs get the side state added", rule=UP_TO_1
    )


class DTL(Structure):
    """DTL (arXiv 2312.07856): a low-rank side network reads the blocks and is added to the outputs of the later half

    Departures from the source: the head reads what it reads in the backbone, where the source takes the mean of the
    patches and normalises it; in hierarchical backbones a stage in which nothing is added has no side state (so the
    source's scripts for Swin set it, which add after 10 of 20 blocks that are read). The learning rate is the median of
    those of the source's 19 scripts for VTAB-1k on ViT-B/16, from 1e-4 to 1e-2. The source drops paths, too.
    """

    Settings = DTLSettings
    families = ("vit", "swin", "convnext")
    published = Published(0.04, "DTL (arXiv 2312.07856), table 1")

    def network(self, blocks: Sequence[Block], first: int) -> CompactSideNetwork:
        """Returns the side network of blocks of one shape, of which those from `first` on are adapted."""
        return CompactSideNetwork(blocks, first, self.settings.rank, self.settings.beta)

    def attach(self, backbone, beside=()):
        """Adds a side network to each run of blocks of one shape in which a block is adapted."""
        networks = nn.ModuleList()
        for blocks, first in self._stages(backbone):
            networks.append(network := self.network(blocks, first))
            for index, block in enumerate(blocks):
                read = functools.partial(network.on_block_input, index)
                block.module.register_forward_pre_hook(read, with_kwargs=True)
                block.module.register_forward_hook(functools.partial(network.on_block_output, index))
        backbone.add(self.name, networks)
        return Attachment(
            backbone,
            unmergeable="a side network reads the hidden states beside the backbone: no weight of the backbone can hold"
            " it",
        )

    def _stages(self, backbone: Backbone) -> list[tuple[list[Block], int]]:
        """Returns runs of blocks of one shape and, within each, the number of the first that is adapted.

        Raises UserError where a block changes the shape of its hidden state.
        """
        blocks = backbone.adapted_blocks(self.settings.blocks)
        stages: list[list[int]] = []
        for index, block in enumerate(blocks):
            if (block.input.layout, block.input.shape) != (block.output.layout, block.output.shape):
                raise self.misfit(backbone, f"{block.name} changes the shape of its hidden state")
            if not stages or blocks[index - 1].output.shape != block.input.shape:
                stages.append([])
            stages[-1].append(index)
        first = len(blocks) - math.ceil(self.settings.share * len(blocks))
        return [([blocks[i] for i in stage], max(0, first - stage[0])) for stage in stages if stage[-1] >= first]


STRUCTURE = DTL
