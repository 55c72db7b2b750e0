from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2a_cli.activations.checkpointing import change_within
from s2a_cli.backbones import Hidden
from s2a_cli.common.distributed import is_main_process
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
from s2a_cli.config.schema import AT_LEAST_1, POSITIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure


class LowRankPrompt(nn.Module):
    """y = x + A B for a hidden state x of N positions and C channels, A [N, r], B [r, C], shared over the batch.

    With G = dL/dy summed over the batch, dA = G B^T, dB = A^T G and dx = dL/dy: the backward pass needs no activation.
    A ~ N(0, 0.02), B = 0, so that y = x at the start. Source: S2A (arXiv 2503.08154), low-rank prompt; shapes and
    initialisation are our reconstruction.
    """

    def __init__(self, hidden: Hidden, rank: int):
        super().__init__()
        self.hidden = hidden
        self.A = nn.Parameter(torch.empty(hidden.positions, rank).normal_(std=0.02))
        self.B = nn.Parameter(torch.zeros(rank, hidden.channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden.from_tokens(self.A @ self.B).to(x.dtype)

    def on_block_input(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Adds the prompt to the hidden state of a block. A forward pre-hook."""
        # Where a block runs in many chunks, the sum does not exist for the whole batch.
        within = change_within(block, self.on_block_input, args, kwargs, self.added)
        return None if within else self.added(args, kwargs)

    def added(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Returns the arguments of a block with the prompt added to its hidden state.

        Raises UserError where that has other positions.
        """
        x = self.hidden.of((args, kwargs))
        self.hidden.check(x)
        return self.hidden.replaced((args, kwargs), self(x))


@dataclass
class PromptSettings:
    rank: int = setting(8, help="of A [positions, rank] and B [rank, channels]", rule=AT_LEAST_1)
    lr_scale: float = setting(1.0, help="the prompts' learning rate is optim.lr times this", rule=POSITIVE)


@dataclass
class PromptAndBlocksSettings(BlocksSettings, PromptSettings):
    pass


class Prompt(Structure):
    """low-rank prompt (LRP): a learnable A B added to the hidden state at the input of every block"""

    Settings = PromptAndBlocksSettings

    def attach(self, backbone, beside=()):
        """Adds a low-rank prompt at the input of every adapted block.

        Where a block has fewer channels or positions than `rank`, its prompt has as many; says so. Raises UserError
        where every block has fewer channels.
        """
        rank = self.settings.rank
        prompts, adapted = nn.ModuleList(), backbone.adapted_blocks(self.settings.blocks)
        widest = max(block.input.channels for block in adapted)
        if rank > widest:
            raise UserError(
                f"rank={rank} of the low-rank prompt is larger than any block of this backbone allows: they have at"
                f" most {widest} channels"
            )
        limits = {block.name: min(block.input.channels, block.input.positions) for block in adapted}
        narrow = {name: limit for name, limit in limits.items() if limit < rank}
        if narrow and is_main_process():
            few = listed([f"{limit} at {name}" for name, limit in narrow.items()], 3)
            print(
                f"s2a: the low-rank prompt has a lower rank than {rank} where channels or positions are few: {few}",
                file=sys.stderr,
            )
        for block in adapted:
            prompt = LowRankPrompt(block.input, min(rank, limits[block.name]))
            block.module.register_forward_pre_hook(prompt.on_block_input, with_kwargs=True)
            prompts.append(prompt)
        backbone.add("prompt", prompts)
        return Attachment(
            backbone,
            learning_rates=((prompts, self.settings.lr_scale),),
            unmergeable="a low-rank prompt adds another value at each position of a hidden state: no weight of the"
            " backbone can hold it",
        )


STRUCTURE = Prompt
