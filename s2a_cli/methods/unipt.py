from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block, Hidden
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.head_input import head_alone, head_width, only_head
from s2a_cli.methods.parts.thread_local import HandedOn


class ParallelNetwork(nn.Module):
    """f' = f + U relu(sum_i c_i m_i) for the feature f that the head reads and the hidden states h_i [N, C_i].

    With q = A relu(f) and t_i = D_i relu(h_i), all of M channels: m_i is the mean of the rows of t_i with the weights
    relu(t_i q), which are divided by their sum, plus the class token's row of t_i; c = softmax_i(g^T (q * mean t_i)).
    The h_i are those before the first block and after each, detached. All as PyTorch draws linear layers: f' is not f
    at the start.
    Source: UniPT (arXiv 2308.14316), as in CLIP4Clip/modules/module_adapter.py of Paranioar/UniPT, for a ViT.
    Departures: g has no bias, which no softmax would see; states without a class token have their mean in its place.
    Larger maps than the last one are averaged to its size, where the source weighs their positions by what the last
    one says (VSE-infty/lib/adapter_for_cnn.py).
    """

    _targets = HandedOn[tuple[Tensor, ...]]((), between_blocks=False)  # t_i [B, N, M], until the head runs

    def __init__(self, blocks: list[Block], feature: int, width: int):
        super().__init__()
        self.states = [blocks[0].input, *(block.output for block in blocks)]
        self.down = nn.ModuleList(nn.Linear(state.channels, width) for state in self.states)
        self.anchor = nn.Linear(feature, width)
        self.up = nn.Linear(width, feature)
        self.gate = nn.Linear(width, 1, bias=False)

    def collect(self, index: int, h: Tensor) -> None:
        """Keeps t_i of the hidden state number `index`."""
        tokens = as_tokens(self.states[index], h.detach(), self.states[-1].positions)
        self._targets = *self._targets, self.down[index](F.relu(tokens))

    def on_first_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Reads the hidden state before the first block. A pre-hook of it."""
        self._targets = ()
        self.collect(0, self.states[0].of((args, kwargs)))

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """Reads the hidden state after the block number `index`. A hook of it."""
        self.collect(index + 1, self.states[index + 1].of(output))

    def on_head_input(self, head: nn.Module, args: tuple) -> tuple:
        """Adds to what the head reads. A pre-hook of the head."""
        feature = args[0].flatten(1)
        return ((feature + self(feature)).to(args[0].dtype).view_as(args[0]), *args[1:])

    def forward(self, feature: Tensor) -> Tensor:
        """Returns what is added to a feature [B, F] of the hidden states that were read. Raises UserError without."""
        targets, self._targets = self._targets, ()
        if not targets:
            raise head_alone()
        q = self.anchor(F.relu(feature))
        means = [t.mean(1) for t in targets]
        merged = []
        for state, t, mean in zip(self.states, targets, means):
            weights = F.relu(t @ q.unsqueeze(-1)).transpose(1, 2)  # [B, 1, N]
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
            merged.append((weights @ t).squeeze(1) + (t[:, 0] if state.prefix else mean))
        gates = torch.softmax(torch.cat([self.gate(q * mean) for mean in means], 1), 1)
        return self.up(F.relu(torch.einsum("bl,blm->bm", gates, torch.stack(merged, 1).to(gates.dtype))))


def as_tokens(hidden: Hidden, h: Tensor, most: int) -> Tensor:
    """Returns a hidden state of any layout as [B, N, C]; pools maps of more than `most` positions to about that."""
    if h.ndim == 3 or hidden.positions <= most:
        return hidden.to_tokens(h)
    maps = F.avg_pool2d(hidden.split(h)[1], round((hidden.positions / most) ** 0.5))
    return maps.flatten(2).transpose(1, 2)


@dataclass
class UniPTSettings(BlocksSettings):
    reduction: int = setting(
        1, help="the network is 1/reduction as wide as the feature that the head reads", rule=AT_LEAST_1
    )


class UniPT(Structure):
    """UniPT (arXiv 2308.14316): a parallel network that attends to detached hidden states adds to the head's feature"""

    Settings = UniPTSettings
    adapts = False
    starts_pretrained = False

    def attach(self, backbone, beside=()):
        """Adds the parallel network, which reads the adapted blocks and changes what the head reads."""
        blocks, head = backbone.adapted_blocks(self.settings.blocks), only_head(self.name, backbone)
        feature = head_width(backbone)
        network = ParallelNetwork(blocks, feature, max(1, feature // self.settings.reduction))
        blocks[0].module.register_forward_pre_hook(network.on_first_input, with_kwargs=True, prepend=True)
        for index, block in enumerate(blocks):
            block.module.register_forward_hook(functools.partial(network.on_block_output, index))
        head.register_forward_pre_hook(network.on_head_input)
        backbone.add("unipt", network)
        return Attachment(
            backbone,
            adapts=False,
            unmergeable="a parallel network stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = UniPT
