"""Finds PyTorch's own gradient checkpointing in a forward pass that is coded: the two do not work together."""

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
    if torch.is_grad_enabled():
        hooks = _AUTOGRAD._top_saved_tensors_default_hooks(True)
        if hooks and hooks[0].__qualname__.startswith("_checkpoint_hook."):
            raise RuntimeError(REFUSED)
    elif had_grad:  # the reentrant kind turns them off
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _REENTRANT:
                raise RuntimeError(REFUSED)
            frame = frame.f_back
