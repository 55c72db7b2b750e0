"""Triton kernels beside their plain twins, on the arguments that real steps give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import BY_NAME, Made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Twins(TorchDispatchMode):
    """Compares each operator that has a Triton kernel, on the arguments that a step gives it, with its plain twin.

    worst: {operator: the largest difference}; of codes the share of bytes that differ, of floats relative to the largest.
    """

    def __init__(self, names: tuple[str, ...], plain: dict[str, Callable]):
        super().__init__()
        self.names, self.plain, self.worst = names, plain, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        space, _, name = func.name().split(".")[0].partition("::")
        if space == "s2a" and name in self.names:
            exact = self.plain[name](*args, **(kwargs or {}))
            gaps = [gap(a, b) for a, b in zip(tree_leaves(found), tree_leaves(exact))]
            self.worst[name] = max([self.worst.get(name, 0.0), *gaps])
        return found


def gap(a: Tensor, b: Tensor) -> float:
    if a.dtype == torch.uint8:
        return (a != b).double().mean().item()
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


def check_kernels(words: list[str], device: torch.device, noise: Callable[[int, int], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What runs the operators on this device, and how far the kernels are from their twins in a step of T2 and of T1."""
    try:
        from s2a_cli.activations import kernels
        from s2a_cli.activations.operators import PLAIN
    except ImportError:
        return {"kernels": "plain"}
    twins = Twins(kernels.OPERATORS, PLAIN)
    for name in ("T1", "T2"):
        made = Made(BY_NAME[name], words, device)
        batch = [tensor.to(device) for tensor in noise(made.backbone.image.size, 2)]
        with twins:
            made(made.model, made.optimizer(), *batch)
    return {"kernels": kernels.available(), "differences": twins.worst}
