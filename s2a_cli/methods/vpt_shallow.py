from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.backbones import Backbone, Block, Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import AT_LEAST_1, BELOW_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.bottleneck import OnMap
from s2a_cli.methods.parts.thread_local import HandedOn


class Prompts(nn.Module):
    """Learned tokens p [tokens, C], the same for every image, which stand behind the image's tokens in some blocks.

    Attention does not depend on the order of tokens, so that the function is that of prompts behind the class token,
    and the places of all other tokens stay what they are. No block hands prompts on: what they have become is taken off
    at its output, so that whatever else reads a hidden state, the head too, finds the image's tokens.
    p ~ U(-a, a), a^2 = 6 / (inputs of the patch embedding + C): Xavier's bound for the patch embedding.
    """

    def __init__(self, state: Hidden, tokens: int, inputs: int, dropout: float):
        super().__init__()
        bound = math.sqrt(6 / (inputs + state.channels))
        self.prompts = nn.Parameter(torch.empty(tokens, state.channels).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, N + tokens, C] for x [B, N, C]."""
        return torch.cat([x, self.dropout(self.prompts.expand(x.shape[0], -1, -1)).to(x.dtype)], dim=1)


class ShallowPrompts(Prompts):
    """Prompts that enter at the first of the blocks and pass through all of them.

    Between two blocks they are kept here, beside the hidden state.
    """

    _passing = HandedOn[Tensor | None](None)  # what has become of the prompts, [B, tokens, C]

    def __init__(self, blocks: Sequence[Block], tokens: int, inputs: int, dropout: float):
        super().__init__(blocks[0].input, tokens, inputs, dropout)
        self.inputs, self.outputs = [block.input for block in blocks], [block.output for block in blocks]

    def on_block_input(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Puts the prompts behind the image's tokens. A hook of the block that is number `index`."""
        x = self.inputs[index].of((args, kwargs))
        passing, self._passing = self._passing, None
        more = self(x) if passing is None or index == 0 else torch.cat([x, passing.to(x.dtype)], dim=1)
        return self.inputs[index].replaced((args, kwargs), more)

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Takes them off again, and keeps them for the next block."""
        y = self.outputs[index].of(output)
        x, passing = y.split([y.shape[1] - len(self.prompts), len(self.prompts)], dim=1)
        self._passing = passing if index + 1 < len(self.outputs) else None
        return self.outputs[index].replaced(output, x)


@dataclass
class VPTSettings(BlocksSettings):
    tokens: int = setting(50, help="prompts; the studies choose from 1 to 200 for each data set", rule=AT_LEAST_1)
    dropout: float = setting(0.0, help="share of a prompt's numbers that are dropped in training", rule=BELOW_1)


class VPTShallow(Structure):
    """VPT-shallow (arXiv 2203.12119): learned prompt tokens beside those of the image, from the first block on

    Source: section 3.2 of the paper; KMnP/vpt, src/models/vit_prompt/vit.py; 50 tokens and no dropout are those of its
    demo.ipynb.
    Departures: prompts stand behind the patches instead of before them (the same function); they leave before the norm
    and the head, which for a head that averages patches is its own function of them; their source runs the frozen
    encoder in evaluation mode (no dropped paths), ours leaves that to the backbone's settings; theirs runs SGD, the
    learning rate is that which OSU-MLB's study (arXiv 2409.16434) chose with AdamW most often.
    """

    Settings = VPTSettings
    starts_pretrained = False
    families = ("vit",)
    published = Published(
        0.0384, "OSU-MLB/ViT_PEFT_Vision (arXiv 2409.16434), tune_output/default_vtab, vpt_shallow with vpt_num=50"
    )

    def attach(self, backbone, beside=()):
        blocks, inputs = self.fitting(backbone)
        if len({hidden.channels for block in blocks for hidden in (block.input, block.output)}) > 1:
            raise self.misfit(backbone, "its blocks have several widths, and prompts pass through all of them")
        prompts = ShallowPrompts(blocks, self.settings.tokens, inputs, self.settings.dropout)
        for index, block in enumerate(blocks):
            insert, remove = (functools.partial(f, index) for f in (prompts.on_block_input, prompts.on_block_output))
            block.module.register_forward_pre_hook(insert, with_kwargs=True)
            block.module.register_forward_hook(remove, prepend=True)  # before all that reads the block's output
        backbone.add(self.name, prompts)
        return self.attached(backbone)

    def fitting(self, backbone: Backbone) -> tuple[list[Block], int]:
        """Returns the adapted blocks and the number of inputs of the patch embedding. Raises UserError for a misfit."""
        blocks = backbone.adapted_blocks(self.settings.blocks)
        if any(isinstance(module, OnMap) for module in backbone.model.modules()):
            raise UserError(
                f"method={self.name}: beside convpass or mona, which read the image's tokens as a map, prompts would"
                " be a part of it"
            )
        if any(isinstance(module, Prompts) for module in backbone.model.modules()):
            raise UserError(f"method={self.name}: not beside another VPT: each takes off the last tokens as its own")
        if not backbone.takes_more_tokens(blocks):
            raise self.misfit(backbone, "its blocks take no more tokens than the image's")
        embedding = backbone.embedding()
        inputs = blocks[0].input.channels if embedding is None else embedding.weight[0].numel()
        return blocks, inputs

    @staticmethod
    def attached(backbone: Backbone) -> Attachment:
        return Attachment(backbone, unmergeable="prompts are further tokens: no weight of the backbone can hold them")


STRUCTURE = VPTShallow
