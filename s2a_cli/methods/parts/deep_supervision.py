"""Votes: logits with losses of their own.

They share no gradient, so that each can be back-propagated as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

_learn: ContextVar[Callable[[Tensor], None] | None] = ContextVar("learn", default=None)


def vote_losses(
    logits: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """The loss of logits [B, classes], or of each of several votes [votes, B, classes]: [1] or [votes].

    Their sum is minimised.
    """
    return torch.stack([criterion(vote, targets) for vote in (logits if logits.ndim == 3 else [logits])])


@contextmanager
def at_once(learn: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, a method's votes are handed to `learn`, which back-propagates them: what was kept for them is free at
    once.
    """
    token = _learn.set(learn)
    try:
        yield
    finally:
        _learn.reset(token)


def cast(vote: Tensor) -> Tensor:
    """A vote [B, classes] as its method keeps it to the end of the forward pass: within `at_once` learned from, and
    without a graph.
    """
    learn = None if torch.compiler.is_compiling() else _learn.get()
    if learn is None or not vote.requires_grad:
        return vote
    learn(vote)
    return vote.detach()
