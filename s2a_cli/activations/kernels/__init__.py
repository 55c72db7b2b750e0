"""Triton kernels for CUDA: second implementations of operators `s2a::*`, each one pass over memory.

The plain PyTorch ones stay in place for every other device, for arguments that a kernel does not cover (the kernels'
docstrings say which), and where Triton is missing or cannot build a kernel on this machine. `available` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from s2a_cli.activations.operators import PLAIN

OPERATORS = ("activate", "encode_levels", "encode_interval", "multiply_levels")
OPERATORS += ("encode_groups", "decode_groups", "encode_norm", "norm_backward")
_LIBRARY = torch.library.Library("s2a", "IMPL", "CUDA")


def available() -> str:
    """What runs on a CUDA device here, for a record: "triton 3.9.0", or "plain" and why."""
    return _launchers()[0] if torch.cuda.is_available() else "plain"


@functools.cache
def _launchers() -> tuple[str, dict[str, Callable]]:
    try:
        import triton

        from s2a_cli.activations.kernels import launch

        launch.probe()
    except Exception as error:  # no Triton, no C compiler for its launchers, a device it does not support, ...
        return f"plain (Triton: {type(error).__name__})", {}
    return f"triton {triton.__version__}", {name: getattr(launch, name) for name in OPERATORS}


def _register(name: str) -> None:
    def chosen(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device(x.device):  # Triton launches on the current one
            return _launchers()[1].get(name, PLAIN[name])(x, *args)

    _LIBRARY.impl(name, chosen)


for _name in OPERATORS:
    _register(_name)
