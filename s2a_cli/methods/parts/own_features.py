"""Hands the backbone's head other features than those of the backbone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from s2a_cli.backbones import Backbone, Block, Hidden
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import owner_of
from s2a_cli.methods.parts.head_input import head_alone
from s2a_cli.methods.parts.thread_local import ThreadLocal


class OwnFeatures(nn.Module):
    """What a side network computes in place of the features that the head reads.

    A subclass calls `hand_over` when it has them, [B, features], after the last block has run.
    """

    _features = ThreadLocal[tuple[Tensor, ...]](())  # once for each layer of the head that is to read them
    _readers = 1  # layers of the head

    def hand_over(self, features: Tensor) -> None:
        """Keeps the features [B, features] for the layers of the head."""
        self._features = (features,) * self._readers

    def on_head_input(self, head: nn.Module, args: tuple) -> tuple:
        """Replaces what a layer of the head is about to read, and forgets it once all have read. A hook of the layer.

        Raises UserError where it does not read one vector of an image, or the blocks have not run before.
        """
        if not self._features:
            raise head_alone()
        features, *left = self._features
        self._features = tuple(left)
        if features.numel() != args[0].numel():
            raise UserError(
                f"method: the head reads {list(args[0].shape)} of this backbone, not one vector an image: a side"
                " network can't stand in"
            )
        return (features.reshape(args[0].shape).to(args[0].dtype), *args[1:])

    def on_logits(self, model: nn.Module, args: tuple, logits: Tensor) -> None:
        """Forgets the features. A hook of the model."""
        self._features = ()

    def replace_features(self, backbone: Backbone) -> None:
        """Registers the hooks by which the head reads these features.

        Raises UserError where it reads those of another side network.
        """
        self._readers = len(backbone.head.layers)
        for layer in backbone.head.layers.values():
            if any(isinstance(owner_of(hook), nn.Module) for hook in layer._forward_pre_hooks.values()):
                raise UserError("method: the head can read one side network only; name one of them")
            layer.register_forward_pre_hook(self.on_head_input)
        backbone.model.register_forward_hook(self.on_logits)


def mixed(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Returns share other + (1 - share) one. Keeps their difference; torch.lerp, or that sum, keeps both."""
    return one + share.to(one.dtype) * (other - one)


def summary(hidden: Hidden, tokens: Tensor) -> Tensor:
    """Returns what stands for an image among tokens [B, N, C]: the class token, or the mean where there is none."""
    return tokens[:, 0] if hidden.prefix else tokens.mean(1)


def is_plain(blocks: Iterable[Block]) -> bool:
    """Tells whether all hidden states are tokens of one shape, as in a plain ViT."""
    hidden = [hidden for block in blocks for hidden in (block.input, block.output)]
    return {(one.layout, one.shape) for one in hidden} == {("tokens", hidden[0].shape)}
