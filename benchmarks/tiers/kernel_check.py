"""Triton kernels beside their plain twins, on the arguments that real steps give them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rows import BY_NAME, Made, Row, noise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2a_cli.activations.quant.primitives import PLAIN

# Largest differences that rounding explains, by dtype: of codes the share of bytes, of floats relative to the largest.
LIMITS = {torch.uint8: 0.01, torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


class Twins(TorchDispatchMode):
    """Compares each operator that has a Triton kernel, on the arguments that a step gives it, with its plain twin.

    worst: {operator: the largest difference}; of codes the share of bytes that differ, of floats relative to the
    largest. of_limit: {operator: the largest difference as a multiple of `LIMITS`}. calls: of each. without: operators
    of ours that have no kernel, with their calls.
    """

    def __init__(self, names: tuple[str, ...], plain: dict[str, Callable]):
        super().__init__()
        self.names, self.plain = names, plain
        self.worst: dict[str, float] = {}
        self.of_limit: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.without: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        space, _, name = func.name().split(".")[0].partition("::")
        if space == "s2a" and name not in self.names:
            self.without[name] += 1
        elif space == "s2a":
            exact = self.plain[name](*args, **(kwargs or {}))
            pairs = [(gap(a, b), LIMITS.get(b.dtype, 1e-6)) for a, b in zip(tree_leaves(found), tree_leaves(exact))]
            self.worst[name] = max([self.worst.get(name, 0.0), *(value for value, _ in pairs)])
            self.of_limit[name] = max([self.of_limit.get(name, 0.0), *(value / limit for value, limit in pairs)])
            self.calls[name] += 1
        return found


def gap(a: Tensor, b: Tensor) -> float:
    """Infinite where shapes differ, or NaN stands on one side alone."""
    if a.shape != b.shape or (b.is_floating_point() and not torch.equal(a.isnan(), b.isnan())):
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if a.dtype == torch.uint8:
        return (a != b).double().mean().item()
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@contextmanager
def left_to_plain() -> Iterator[Counter[str]]:
    """Counts the calls that a kernel's launcher hands on to the plain twin, because the kernel does not cover them."""
    from s2a_cli.activations.kernels import launch

    counted: Counter[str] = Counter()

    class Counting(dict):
        def __getitem__(self, name: str) -> Callable:
            counted[name] += 1
            return super().__getitem__(name)

    original, launch.PLAIN = launch.PLAIN, Counting(launch.PLAIN)
    try:
        yield counted
    finally:
        launch.PLAIN = original


def check_row(row: Row, words: list[str], device: torch.device) -> dict[str, Any]:
    """A step of four images of a row, each operator beside its twin: of two, calibrated values are 1 and -1, which tie.

    On a CPU the kernels run in Triton's interpreter, which has to be set: TRITON_INTERPRET=1.
    """
    from s2a_cli.activations.kernels import OPERATORS, launch

    made = Made(row, words, device)
    batch = [tensor.to(device) for tensor in noise(made.backbone.image.size, 4)]
    other = PLAIN if device.type == "cuda" else {name: getattr(launch, name) for name in OPERATORS}
    with left_to_plain() as plain, Twins(OPERATORS, other) as twins:
        made(made.model, made.optimizer(), *batch)
    kinds = ("worst", "of_limit", "calls", "without")
    return {kind: dict(getattr(twins, kind)) for kind in kinds} | {"left_to_plain": dict(plain)}


def check_kernels(words: list[str], device: torch.device) -> dict[str, Any]:
    """What runs the operators on this device, and how far the kernels are from their twins in a step of T2 and of
    T1.
    """
    from s2a_cli.activations import kernels

    differences: dict[str, float] = {}
    for name in ("T1", "T2") if (running := kernels.available()).startswith("triton") else ():
        for operator, value in check_row(BY_NAME[name], words, device)["worst"].items():
            differences[operator] = max(value, differences.get(operator, 0.0))
    return {"kernels": running, "differences": differences}
