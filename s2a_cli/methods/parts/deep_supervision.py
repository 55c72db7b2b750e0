"""Auxiliary heads: logits beside the model's own, each with a loss of its own (deep supervision, arXiv 1409.5185).

They share no gradient, so that their losses can be back-propagated as soon as they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli.activations.torch_checkpoint import is_checkpointing
from s2a_cli.methods.parts.thread_local import HandedOn, ThreadLocal

# Takes the numbers of auxiliary heads and their logits [heads, B, classes], and back-propagates their losses.
Learn = Callable[[Sequence[int], Tensor], None]


def losses_of(
    logits: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """Returns the loss of logits [B, classes], [1], or of each of several [heads, B, classes], [heads].

    Their sum is minimised.
    """
    return torch.stack([criterion(one, targets) for one in (logits if logits.ndim == 3 else [logits])])


def mean_logits(logits: Tensor) -> Tensor:
    """Returns the mean of the logits of several heads [heads, B, classes], [B, classes].

    Its probabilities are the heads' geometric mean, normalised (the logarithmic opinion pool, Heskes 1998). With
    p_h = softmax(logits[h]) and targets t that add up to 1, its cross entropy is mean_h CE(logits[h], t) - D, where
    D = -log sum_c prod_h p_h(c)^(1 / heads) >= 0 is the heads' disagreement, which knows no targets. The gradient of
    each head's logits is (softmax(mean) - t) / heads.
    """
    return logits.mean(0)


class AuxiliaryHeads(nn.Module):
    """Collects the auxiliary logits of a forward pass.

    A subclass hands them to `collect` when they are computed and takes all of them with `collected` at the end.
    """

    _learn = ThreadLocal[Learn | None](None)
    _logits = HandedOn[tuple[tuple[int, Tensor], ...]]((), between_blocks=False)  # of each head, by its number

    @contextmanager
    def learning(self, learn: Learn) -> Iterator[None]:
        """Hands auxiliary logits to `learn` within: what was kept for their backward pass is free at once."""
        before, self._learn = self._learn, learn
        try:
            yield
        finally:
            self._learn = before

    def begin(self) -> None:
        """Forgets the logits of a forward pass that did not end."""
        self._logits = ()

    def collect(self, heads: Sequence[int], logits: Tensor) -> None:
        """Keeps the logits of some heads [heads, B, classes] until the forward pass ends.

        Within `learning` it keeps them without a graph, but where PyTorch's checkpoints have to find one again. heads:
        their numbers.
        """
        if self._learn and logits.requires_grad and not (torch.compiler.is_compiling() or is_checkpointing()):
            self._learn(heads, logits)
            logits = logits.detach()
        self._logits = *self._logits, *zip(heads, logits.unbind(0))

    def collected(self) -> list[Tensor]:
        """Returns the logits of this forward pass, each [B, classes], in the order of the heads; forgets them."""
        logits, self._logits = self._logits, ()
        return [one for _, one in sorted(logits, key=lambda numbered: numbered[0])]
