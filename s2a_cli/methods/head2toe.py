from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from s2a_cli.backbones import Hidden
from s2a_cli.config.rules import number
from s2a_cli.config.schema import AT_LEAST_1, NOT_NEGATIVE
from s2a_cli.config.settings import setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts.feature_head import FeatureHead
from s2a_cli.methods.parts.thread_local import ThreadLocal


class PooledState(nn.Module):
    """Detaches a hidden state and pools it to about `target` numbers [B, D], at least one of each channel.

    Tokens are averaged over runs of positions, class tokens among them, and maps over a grid.
    """

    def __init__(self, hidden: Hidden, target: int):
        super().__init__()
        self.hidden = hidden
        cells = max(1, target // hidden.channels)
        self.is_map = len(hidden.shape) == 3
        self.cells = min(math.isqrt(cells), *hidden.grid) if self.is_map else min(cells, hidden.positions)

    @property
    def size(self) -> int:
        """Returns D."""
        return self.hidden.channels * self.cells ** (2 if self.is_map else 1)

    @torch.no_grad()
    def forward(self, h: Tensor) -> Tensor:
        if self.is_map:
            return F.adaptive_avg_pool2d(self.hidden.split(h)[1], self.cells).flatten(1)
        tokens = h if self.hidden.layout == "channels_first" else h.transpose(1, 2)
        return F.adaptive_avg_pool1d(tokens, self.cells).flatten(1)


class SelectedFeatures(nn.Module):
    """logits + W [.., x_i / |x_i|, ..] for pooled hidden states x_i, in which features that are not `kept` are zero.

    W = 0 at the start. For the first `select_after` steps all features are kept, and a proximal step of the group lasso
    follows each: the norm of W's column of a feature shrinks by the learning rate times `lasso`. Then a feature's score
    is the square of that norm, the best `fraction` is kept, and W is trained anew from 0.
    Source: Head2Toe (arXiv 2201.03529), head2toe/models/finetune_fs.py of google-research/head2toe, `connectivity_l2`.
    Departures: both phases are of one run, and the backbone's own head, which reads its own feature as it is, trains in
    both; features are the outputs of blocks, not of each layer within; a grid need not divide a map; the lasso is a
    proximal step, not a gradient; `fraction` and `target` are not chosen by cross-validation.
    """

    trained_buffers = ("kept", "steps")
    kept: Tensor
    steps: Tensor

    _read = ThreadLocal[tuple[Tensor, ...]](())

    def __init__(self, states: list[Hidden], classes: int, settings: Head2ToeSettings):
        super().__init__()
        self.lasso, self.fraction, self.select_after = settings.lasso, settings.fraction, settings.select_after
        pooled = [PooledState(state, settings.target) for state in states]
        self.features, self.sizes = nn.ModuleList(pooled), [feature.size for feature in pooled]
        self.classifier = nn.Linear(sum(self.sizes), classes, bias=False)
        nn.init.zeros_(self.classifier.weight)
        self.register_buffer("kept", torch.ones(sum(self.sizes), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def on_block_output(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """Reads a hidden state. A hook of the block that is read as number `index`."""
        if index == 0:
            self._read = ()
        feature = cast(PooledState, self.features[index])
        self._read = *self._read, feature(feature.hidden.of(output))

    def on_logits(self, model: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        """Adds to the model's logits. A hook of the model."""
        return self.join(logits)

    def read(self, tensors: list[Tensor]) -> None:
        """Takes the pooled states, in place of a forward pass through the blocks."""
        self._read = tuple(tensors)

    def join(self, logits: Tensor) -> Tensor:
        """Returns the model's logits [B, classes] with those of the features that were read."""
        states, self._read = self._read, ()
        dtype = self.classifier.weight.dtype
        kept = self.kept.split(self.sizes)
        parts = [F.normalize(x.to(dtype) * mask, dim=1) for x, mask in zip(states, kept, strict=True)]
        return logits + self.classifier(torch.cat(parts, 1)).to(logits.dtype)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Shrinks the columns of W that say little, and selects features when all have been scored."""
        steps = int(self.steps)
        if steps >= self.select_after:
            return
        weight = self.classifier.weight
        rate = next(group["lr"] for group in optimizer.param_groups if any(p is weight for p in group["params"]))
        norms = weight.norm(dim=0)
        weight *= (1 - rate * self.lasso / norms.clamp(min=1e-12)).clamp(min=0)
        self.steps += 1
        if steps + 1 == self.select_after:
            best = weight.norm(dim=0).topk(max(1, int(self.fraction * len(norms)))).indices
            self.kept.zero_()
            self.kept[best] = True
            weight.zero_()
            optimizer.state.pop(weight, None)


@dataclass
class Head2ToeSettings(BlocksSettings):
    target: int = setting(512, help="numbers to which a hidden state is pooled, or one a channel", rule=AT_LEAST_1)
    fraction: float = setting(
        0.1,
        help="of the features that is kept",
        rule=number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    )
    select_after: int = setting(
        500, help="optimisation steps in which all features are scored; a shorter run keeps them all", rule=AT_LEAST_1
    )
    lasso: float = setting(1e-5, help="weight of the group lasso while features are scored", rule=NOT_NEGATIVE)


class Head2Toe(Structure):
    """Head2Toe (arXiv 2201.03529): a linear head on selected features of all blocks, pooled and normalised"""

    Settings = Head2ToeSettings
    adapts = False
    keeps_features = True

    def attach(self, backbone, beside=()):
        """Adds a linear layer on the pooled outputs of the adapted blocks."""
        settings, read = self.settings, backbone.adapted_blocks(self.settings.blocks)
        selected = SelectedFeatures([block.output for block in read], backbone.head.classes, settings)
        for index, block in enumerate(read):
            block.module.register_forward_hook(functools.partial(selected.on_block_output, index))
        backbone.model.register_forward_hook(selected.on_logits, prepend=True)  # before auxiliary logits join them
        backbone.add("head2toe", selected)
        return Attachment(
            backbone,
            adapts=False,
            after_step=(selected.after_step,),
            feature_head=FeatureHead(backbone.head, selected, f"blocks={settings.blocks} target={settings.target}"),
            unmergeable="a linear layer on hidden states stands beside the backbone: no weight of it can hold that",
        )


STRUCTURE = Head2Toe
