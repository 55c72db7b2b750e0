from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.backbones import Block
from s2a_cli.common.errors import UserError
from s2a_cli.config.rules import Rule
from s2a_cli.config.schema import AT_LEAST_1
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Published, Structure
from s2a_cli.methods.parts.head_input import head_width
from s2a_cli.methods.parts.own_features import OwnFeatures, is_plain
from s2a_cli.methods.parts.thread_local import HandedOn, ThreadLocal

COUNTS = Rule("a list of integers of at least 1", lambda values: len(values) > 0 and min(values) >= 1)


@dataclass
class HSTSettings(BlocksSettings):
    widths: list[int] = setting([32, 48, 64, 72], help="channels of the side network, by stage", rule=COUNTS)
    heads: list[int] = setting([2, 4, 8, 12], help="attention heads of the side network, by stage", rule=COUNTS)
    meta: int = setting(1, help="learned tokens before those of each block", rule=AT_LEAST_1)


class CrossAttention(nn.Module):
    """Attention of side tokens [B, N, width] to a few others [B, M, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        pairs = ((self.q, x), (self.k, others), (self.v, others))
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, y in pairs)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SideBlock(nn.Module):
    """x + attention(norm(x), [meta, mean of h]), then x + h, then x + MLP(norm(x)), for what is read of a block, h."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = CrossAttention(width, heads)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, meta: Tensor, read: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), torch.cat([meta, read.mean(1, keepdim=True)], dim=1))
        x = x + read
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Stage(nn.Module):
    """A stage of the side network: halves the map (the first quarters the image), then one side block a block read.

    `bridge` brings what is read of the backbone to the width of the stage, meta tokens and patches alike.
    """

    def __init__(self, channels: int, before: int | None, width: int, heads: int, blocks: int):
        super().__init__()
        if before is None:
            bend = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            self.embed: nn.Module = nn.Sequential(*bend, nn.Conv2d(width, width, 2, stride=2))
        else:
            self.embed = nn.Conv2d(before, width, 3, stride=2, padding=1)
        self.embed_norm = nn.LayerNorm(width)
        self.bridge = nn.Linear(channels, width)
        self.meta_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.blocks = nn.ModuleList(SideBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class HierarchicalSideNetwork(OwnFeatures):
    """A side network of a few stages, as a CNN has them, whose blocks attend to one learned token of each block.

    The meta tokens stand before those of block i, are taken off what it returns, and go to the side network with its
    patches: there is one side block for each block of the backbone. The network's own input is the image. The head
    reads the mean of its last map, after a BatchNorm, in as many of its columns; it reads zeros in the others.
    Weights ~ N(0, 0.02), truncated, those of convolutions He normal; biases 0; meta tokens Xavier uniform.
    Source: HST (arXiv 2310.05393), section 3; models/vit_hsn.py and models/vit_custom_modules.py of AFeng-x/HST. There
    patches are resized and then projected, which is the same and keeps more; there the last BatchNorm has no weight and
    bias, which add nothing before a linear layer: with them it is one that trains, and so uses statistics of the batch.
    """

    _x = HandedOn[Tensor | None](None)  # the image, then the map or tokens of the stage
    _size = ThreadLocal[tuple[int, int]]((0, 0))

    def __init__(self, blocks: Sequence[Block], settings: HSTSettings, features: int):
        super().__init__()
        count, channels = len(settings.widths), blocks[0].input.channels
        self.hiddens, self.features = [(block.input, block.output) for block in blocks], features
        ends = [len(blocks) * stage // count for stage in range(count + 1)]
        self.places = [(stage, i) for stage in range(count) for i in range(ends[stage + 1] - ends[stage])]
        self.stages = nn.ModuleList(
            Stage(channels, before, width, heads, end - start)
            for before, width, heads, start, end in zip(
                [None, *settings.widths], settings.widths, settings.heads, ends, ends[1:]
            )
        )
        self.apply(_initialise)
        bound = (6 / (channels + settings.meta * channels)) ** 0.5
        self.meta = nn.Parameter(torch.empty(len(blocks), settings.meta, channels).uniform_(-bound, bound))
        self.norm = nn.BatchNorm1d(settings.widths[-1], eps=1e-6)

    def on_images(self, model: nn.Module, args: tuple) -> None:
        """Takes the images. A hook of the model."""
        self._x = args[0]

    def on_block_input(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Puts the meta tokens of block `index` before its tokens. A hook of that block."""
        hidden = self.hiddens[index][0]
        h = hidden.of((args, kwargs))
        return hidden.replaced(
            (args, kwargs), torch.cat([self.meta[index].to(h.dtype).expand(h.shape[0], -1, -1), h], 1)
        )

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Takes the meta tokens off, and the side network past block `index`. A hook of that block."""
        (number, place), hidden = self.places[index], self.hiddens[index][1]
        stage, count = cast(Stage, self.stages[number]), self.meta.shape[1]
        tokens = hidden.of(output)
        x, self._x = self._x, None
        assert x is not None, "the model has been called, and the blocks before this one"
        if place == 0:
            x = stage.embed(x)
            self._size = x.shape[-2], x.shape[-1]
            x = stage.embed_norm(x.flatten(2).transpose(1, 2))
        # At once, so that what the block returns is kept once.
        meta, seen = stage.bridge(tokens).split([count, tokens.shape[1] - count], dim=1)
        read = F.interpolate(hidden.split(seen)[1], self._size, mode="bilinear").flatten(2).transpose(1, 2)
        x = stage.blocks[place](x, stage.meta_norms[place](meta), read)
        if place == len(stage.blocks) - 1:
            x = stage.norm(x)
            if number < len(self.stages) - 1:
                x = x.transpose(1, 2).unflatten(2, self._size)
        if index == len(self.places) - 1:
            features = self.norm(x.mean(1))
            self.hand_over(F.pad(features, (0, self.features - features.shape[1])))
        else:
            self._x = x
        return hidden.replaced(output, tokens[:, count:])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class HST(Structure):
    """HST (arXiv 2310.05393): meta tokens, norms of the blocks, and a side network of four stages that the head reads

    The meta tokens pass through the backbone, so gradients do, too. The learning rate is the most frequent one of the
    source's 19 scripts for VTAB-1k (1e-3 to 1e-2). The source also drops paths, in the side network, too.
    """

    Settings = HSTSettings
    starts_pretrained = False
    replaces_layers = True  # attached after other structures, whose hooks of blocks then see no meta tokens
    families = ("vit",)
    published = Published(0.78, "HST (arXiv 2310.05393), table of VTAB-1k")

    def attach(self, backbone, beside=()):
        """Adds meta tokens and a side network to the adapted blocks, and unfreezes their normalisations.

        Raises UserError where there are fewer blocks than stages, where heads do not divide widths, and where the head
        reads fewer features than the last stage has channels.
        """
        blocks, settings = backbone.adapted_blocks(self.settings.blocks), self.settings
        if not is_plain(blocks):
            raise self.misfit(backbone, "its hidden states are no tokens of one shape throughout")
        if not backbone.takes_more_tokens(blocks):
            raise self.misfit(backbone, "its blocks take no further tokens")
        widths, heads, features = list(settings.widths), list(settings.heads), head_width(backbone)
        if len(heads) != len(widths) or any(width % n for width, n in zip(widths, heads)):
            raise UserError(f"method.heads={heads}: accepted are divisors of method.widths={widths}, one a stage")
        if len(widths) > len(blocks) or widths[-1] > features:
            raise UserError(
                f"method.widths={widths}: accepted are at most {len(blocks)} stages, the number of adapted blocks, the"
                f" last of at most {features} channels, which the head reads"
            )
        network = HierarchicalSideNetwork(blocks, settings, features)
        for branch in (branch for block in blocks for branch in block.branches):
            branch.norm.requires_grad_(True)
        backbone.model.register_forward_pre_hook(network.on_images)
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(functools.partial(network.on_block_input, index), with_kwargs=True)
            take_off = functools.partial(network.on_block_output, index)
            block.module.register_forward_hook(take_off, prepend=True)
        network.replace_features(backbone)
        backbone.add("hst", network)
        return Attachment(
            backbone,
            unmergeable="a side network stands beside the backbone: no weight of the backbone can hold it",
        )


STRUCTURE = HST
