"""Finds PyTorch's own gradient checkpointing in a forward pass: codes, and states beside it, do not work with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import checkpoint

REFUSED = (
    "torch.utils.checkpoint within compress_activations: what it computes again it would compute outside, where"
    " nothing is coded. Take it off (in timm: model.set_grad_checkpointing(False)), and let recompute='block' do what"
    " it did"
)
_AUTOGRAD: Any = getattr(torch._C, "_autograd")  # noqa: B009 (PyTorch declares no type for it)
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__


def refuse_checkpointing(had_grad: bool) -> None:
    """Raises RuntimeError where the caller is within a checkpoint. had_grad: whether gradients were on further out."""
    if is_checkpointing() or (had_grad and is_checkpointing_reentrantly()):
        raise RuntimeError(REFUSED)


def is_checkpointing() -> bool:
    """Tells whether the caller is in the forward pass of a checkpoint that is not reentrant, the first or a later."""
    hooks = _AUTOGRAD._top_saved_tensors_default_hooks(True) if torch.is_grad_enabled() else None
    return bool(hooks) and hooks[0].__qualname__.startswith(("_checkpoint_hook.", "_recomputation_hook."))


def is_checkpointing_reentrantly() -> bool:
    """Tells whether the caller is in the forward pass of a reentrant checkpoint, which turns gradients off."""
    frame = None if torch.is_grad_enabled() else inspect.currentframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False
