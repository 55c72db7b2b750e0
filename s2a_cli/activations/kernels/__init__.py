"""Registers Triton kernels for CUDA: second implementations of operators `s2a::*`, each one pass over memory.

The PyTorch ones stay in place for every other device, for arguments that a kernel does not cover (launch.py says
which), and where Triton is missing or cannot build a kernel on this machine, which is said once. `available` says which
run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from s2a_cli.activations.quant.primitives import PLAIN

OPERATORS = ("activate", "quantize_elementwise", "pack_interval", "multiply_dequantized")
OPERATORS += (
    "quantize_groupwise",
    "dequantize_groupwise",
    "quantize_normalized",
    "norm_backward",
    "softmax_backward",
    "weight_gradient",
)
OPERATORS += ("max_pool2d", "max_pool2d_backward", "dequantize_int8")
_LIBRARY = torch.library.Library("s2a", "IMPL", "CUDA")


def available() -> str:
    """Returns what runs on a CUDA device here, for a record: "triton 3.9.0", or "plain" and why."""
    return _launchers()[0] if torch.cuda.is_available() else "plain"


Launchers = tuple[str, dict[str, Callable]]
_known: Launchers | None = None
_warned = False


def _launchers() -> Launchers:
    """Returns what runs, in words, and the kernels by operator.

    Tries again after a failure that may pass, such as too little memory.
    """
    global _known, _warned
    if _known is not None:
        return _known
    try:
        import triton

        from s2a_cli.activations.kernels import launch

        launch.probe()
        _known = f"triton {triton.__version__}", {name: getattr(launch, name) for name in OPERATORS}
        return _known
    except Exception as error:  # no Triton, no C compiler for its launchers, a device that it does not support, ...
        plain = f"plain (Triton: {type(error).__name__})", {}
        if not _warned:
            _warned = True
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            warnings.warn(
                "codes are made by plain PyTorch, several times slower: Triton can't build its kernels"
                f" ({type(error).__name__}: {reason})",
                RuntimeWarning,
                stacklevel=2,
            )
        if "out of memory" not in str(error).lower():
            _known = plain
        return plain


def _register(name: str) -> None:
    def chosen(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device(x.device):  # Triton launches on the current one
            return _launchers()[1].get(name, PLAIN[name])(x, *args)

    _LIBRARY.impl(name, chosen)


for _name in OPERATORS:
    _register(_name)
