"""Helpers that all autograd functions of the operator families share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def covers(x: Any) -> bool:
    """Returns whether a gradient is to flow through this input, and it is of a kind that codes can stand for."""
    return isinstance(x, Tensor) and x.requires_grad and x.is_floating_point() and torch.is_grad_enabled()


def alone(x: Tensor) -> Tensor:
    """Returns x, or a copy where it is a small view of something large, all of which would stay alive with it."""
    small = x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if small else x


def first_order(backward: Callable) -> Callable:
    """Decorates a backward that has no derivative itself: with create_graph=True it raises, not a silent constant."""

    @functools.wraps(backward)
    def checked(ctx, *grads: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a side branch, and a forward pass under s2a_cli.activations.compress_activations, keep what first "
                "derivatives need: create_graph=True and double backward are not supported"
            )
        return backward(ctx, *grads)

    return checked
