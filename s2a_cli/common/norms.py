"""Normalisations whose statistics move in training."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def is_batch_norm(module: nn.Module) -> TypeGuard[_NormBase]:
    """Tells whether a module is a BatchNorm, or an InstanceNorm that has running statistics as one has."""
    return isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.running_mean is not None)
