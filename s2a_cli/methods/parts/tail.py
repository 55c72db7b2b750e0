"""The part of a model behind frozen first blocks: what these return goes in, the logits come out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.backbones import ADDED, Backbone
from s2a_cli.common.hooks import may_change_input, owner_of
from s2a_cli.common.norms import take_back
from s2a_cli.methods.parts.feature_head import Features


class _AllSeen(Exception):
    """Ends a forward pass whose rest is of no use."""


class Tail(nn.Module):
    """A model whose first blocks do not run: they return what was kept of them.

    kept: the first blocks, which nothing that trains is in or before. The last of them returns its hidden state as it
    was kept, in which all is that the blocks behind it compute with; those before it return what they are given. What
    side branches read of all of these is kept as well. What the model computes before its blocks, such as its patches,
    it computes of one blank image. `misfit` says of a model what does not go with that.
    """

    misfit = "the blocks of {} compute with more than what the block before them returns"

    def __init__(self, backbone: Backbone, blocks: list[nn.Module]):
        super().__init__()
        self.model, self._size, self.kept = backbone.model, backbone.image.size, blocks

    @property
    def about(self) -> list[Any]:
        """What the features depend on, beside the backbone: where they are taken, and what reads them."""
        names = {module: name for name, module in self.model.named_modules()}
        read = [[names[block], *(repr(feature) for feature in _features(block))] for block in self.kept]
        return ["tail", read]

    def forward(self, features: Features) -> Tensor:
        """Returns the model's logits [B, classes] on the images that the features are of."""
        state, *others = features.tensors
        weight = next(self.model.parameters())
        image = torch.zeros(1, 3, self._size, self._size, dtype=weight.dtype, device=weight.device)
        with ExitStack() as stack:
            for block in self.kept[:-1]:
                stack.enter_context(_instead(block, lambda x, *args, **kwargs: x))
            for module, kept in zip((self.kept[-1], *self._features()), (state, *others), strict=True):
                stack.enter_context(_instead(module, lambda *args, kept=kept, **kwargs: kept))
            return self.model(image)

    @torch.no_grad()
    def capture(self, logits: Callable[[], Tensor], whole: bool = True) -> tuple[Features, Tensor]:
        """Returns the features of a forward pass of the model, which `logits()` makes, and what that returns.

        whole: false ends the pass behind the kept blocks; its logits are then empty. Raises TypeError where the last of
        them returns more than a hidden state.
        """
        seen: dict[nn.Module, Any] = {}
        modules = (self.kept[-1], *self._features())

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            seen[module] = out
            if not whole and len(seen) == len(modules):
                raise _AllSeen

        out = torch.empty(0)
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(keep, prepend=True).remove)
            with suppress(_AllSeen):
                out = logits()
        if not all(isinstance(seen.get(module), Tensor) for module in modules):
            raise TypeError("a block returns more than a hidden state")
        return Features(seen[module] for module in modules), out

    def _features(self) -> list[nn.Module]:
        return [feature for block in self.kept for feature in _features(block)]


def tail_of(backbone: Backbone) -> Tail | None:
    """Returns what is behind the first blocks, those that nothing that trains or acts is in or before.

    Side branches may read them. None where there are no such blocks.
    """
    added, blocks = set(getattr(backbone.model, ADDED, nn.Module()).modules()), set(backbone.block_modules)

    def is_touched(module: nn.Module) -> bool:
        reading = len(_features(module)) if module in blocks else 0
        acting = sum(hook is not take_back for hook in module._forward_hooks.values())
        hooks = module is not backbone.model and acting > reading
        hooks = hooks or any(map(may_change_input, module._forward_pre_hooks.values()))
        return hooks or any(p.requires_grad for p in module.parameters(False))

    touched = [module for module in backbone.model.modules() if module not in added and is_touched(module)]
    first = backbone.blocks_before(touched)
    return Tail(backbone, first) if first else None


def _features(block: nn.Module) -> list[nn.Module]:
    """Returns the modules that are all by which side branches read a block's output, see SideBranch."""
    found = []
    for hook in block._forward_hooks.values():
        branch = owner_of(hook)
        # A check of the protocol by isinstance would not see submodules from Python 3.12 on.
        features = getattr(branch, "features", None) if hasattr(branch, "read") else None
        if isinstance(features, nn.ModuleList) and isinstance(hook, functools.partial):
            found.append(features[hook.args[0]])
    return found


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Runs a function in the place of a module's forward within; its hooks run as ever."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
