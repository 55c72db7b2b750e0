"""Describes hidden states: how they lie in a tensor, and which of the tensors of a block they are."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from s2a_cli.common.errors import UserError


@functools.lru_cache(maxsize=1024)
def grid_like(image: tuple[int, int], patches: int) -> tuple[int, int] | None:
    """Returns the height and width of the map of so many patches that one stride over the image makes; None for none.

    Of a square image that is a square.
    """
    height, width = image
    if height == width:
        return square(patches)
    fits = []
    for rows in (count for count in range(1, patches + 1) if patches % count == 0):
        columns = patches // rows  # height / stride and width / stride, rounded up or down
        least = max(height / (rows + 1), width / (columns + 1))
        if least < min(height / max(rows - 1, 1e-9), width / max(columns - 1, 1e-9)):
            fits.append((abs(math.log(rows * width / (columns * height))), rows, columns))
    return min(fits)[1:] if fits else None


def square(patches: int) -> tuple[int, int] | None:
    """Returns the height and width of a square map of so many patches; None where there is none."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


@dataclass(frozen=True)
class Hidden:
    """A hidden state: its layout and its shape without the batch.

    The layout is tokens ([B, N, C], of which the first `prefix` are class or register tokens), channels_last
    ([B, H, W, C]) or channels_first ([B, C, H, W] or [B, C, N]). place: its index among the tensors that a block takes,
    or returns. image: height and width in pixels of the images that it is of.
    """

    layout: str
    shape: tuple[int, ...]
    prefix: int = 0
    place: int = 0
    image: tuple[int, int] = (1, 1)

    @property
    def channels(self) -> int:
        """Returns C."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]

    @property
    def positions(self) -> int:
        """Returns N, or H * W."""
        return math.prod(self.shape) // self.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Returns height and width of the map of positions, (N, 1) for patches that are no map like the image."""
        if len(self.shape) == 3:
            height, width = self.shape[1:] if self.layout == "channels_first" else self.shape[:2]
            return height, width
        patches = self.positions - self.prefix
        return grid_like(self.image, patches) or square(patches) or (patches, 1)

    def from_tokens(self, x: Tensor) -> Tensor:
        """Brings [..., N, C] into this layout: [..., N, C], [..., H, W, C], [..., C, H, W] or [..., C, N].

        Raises UserError where a map has other positions.
        """
        if self.layout == "tokens":
            return x
        if x.shape[-2] != self.positions:
            raise self._other_positions(x.shape[-2])
        if self.layout == "channels_first":
            x = x.transpose(-1, -2)
        return x.reshape(*x.shape[:-2], *self.shape)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Brings a hidden state of this layout to [B, N, C]."""
        return x.flatten(2).transpose(1, 2) if self.layout == "channels_first" else x.flatten(1, -2)

    def check(self, x: Tensor) -> None:
        """Raises UserError for a hidden state [B, ...] of other positions, as those of images of another size are."""
        if tuple(x.shape[1:]) != self.shape:
            raise self._other_positions(x[:1].numel() // self.channels)

    def _other_positions(self, found: int) -> UserError:
        at = "" if self.image == (1, 1) else f", of images of {self.image[0]} x {self.image[1]}"
        return UserError(
            f"method: what is attached has a place for each of {self.positions} positions{at}, and a block has {found}"
            " now: call the model with inputs of the size that it was attached at, or attach with inputs= of this size"
        )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits a hidden state into its prefix tokens [B, P, C] and its map [B, C, H, W].

        The map of tokens that are no map like the image is [B, C, N, 1]. Raises UserError where there are more
        tokens, or fewer.
        """
        if x.ndim == 4:
            maps = x if self.layout == "channels_first" else x.permute(0, 3, 1, 2)
            return x.new_empty(x.shape[0], 0, self.channels), maps
        tokens = x.transpose(1, 2) if self.layout == "channels_first" else x
        if tokens.shape[1] != self.positions:
            raise self._other_positions(tokens.shape[1])
        patches = tokens[:, self.prefix :].transpose(1, 2)
        return tokens[:, : self.prefix], patches.unflatten(-1, self.grid)

    def of(self, values: Any) -> Tensor:
        """Returns this hidden state among the values (in any containers) that a block takes, or returns.

        Raises UserError for a nested tensor, which nn.TransformerEncoder makes of padded ones in evaluation.
        """
        found = [x for x in tree_leaves(values) if isinstance(x, Tensor)][self.place]
        if found.is_nested:
            raise UserError(
                "method: a block is handed a nested tensor, which what is attached does not read: build"
                " nn.TransformerEncoder with enable_nested_tensor=False"
            )
        return found

    def replaced(self, values: Any, hidden: Tensor) -> Any:
        """Returns the same values with the tensor `hidden` in the place of this hidden state."""
        found, structure = tree_flatten(values)
        index = [i for i, x in enumerate(found) if isinstance(x, Tensor)][self.place]
        return tree_unflatten([*found[:index], hidden, *found[index + 1 :]], structure)
