"""Remembers the tensors in a module's own attributes, to forget those that come."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MACHINERY = {*vars(nn.Module())}  # what every module has: parameters, buffers, children, hooks, its mode
MISSING = object()


class Attributes:
    """Remembers a module's attributes, and what is in those that are dicts and lists; not its parameters and buffers.

    `restore` takes back the changes that have to do with tensors, and leaves all others.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.values = {name: value for name, value in vars(module).items() if name not in MACHINERY}
        self.contents = {name: value.copy() for name, value in self.values.items() if isinstance(value, dict | list)}

    def restore(self) -> None:
        """Puts back what tensors have replaced, and takes away those that have come."""
        there = vars(self.module)
        for name in {*there, *self.values} - MACHINERY:
            before, now = self.values.get(name, MISSING), there.get(name, MISSING)
            if now is before:
                if name in self.contents and _tensors(self.contents[name]) != _tensors(now):
                    now.clear()
                    now.update(self.contents[name]) if isinstance(now, dict) else now.extend(self.contents[name])
            elif _tensors(now) or _tensors(before):
                if before is MISSING:
                    del there[name]
                else:
                    there[name] = before


def _tensors(value: Any) -> list[int]:
    """Returns which tensors a value is, or holds in containers."""
    return [id(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
