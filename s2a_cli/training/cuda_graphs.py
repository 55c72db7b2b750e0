"""Replays the forward and backward pass of a micro-batch as a CUDA graph: one launch takes the place of hundreds.

A fast device waits for the host that launches its kernels one by one, most of all in small micro-batches and where
codes make each operator several kernels. A graph computes what was captured again, on the same addresses: images and
targets are copied to where it reads them, and it adds to gradients that stay where they are, which is all that it needs
of memory beyond what a step needs. Its kernels are those of the eager pass, so that results are the same.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2a_cli.methods.parts.feature_head import Features

Batch = Tensor | Features
Pass = Callable[[Any, Tensor], Tensor]  # (images, targets) -> loss, detached; adds to gradients
Capture = Callable[[Callable[[], Tensor], Any], tuple[Tensor, Callable[[], None], Any]]
Key = tuple[Any, ...]
_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Makes a stream that can be captured the current one; on other devices than CUDA nothing happens.

    It is the same one each time, and that of passes that are not captured: cuBLAS keeps workspaces for every stream.
    """
    if device.type != "cuda":
        yield
        return
    stream = _streams.setdefault(device, torch.cuda.Stream(device))
    before = torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
    """Captures run(), which computes nothing then.

    Returns the tensor in which its result is after a replay, what replays it, and its pool of memory, which the next
    graph may share.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = None if current == torch.cuda.default_stream() else current
    # Other threads pin batches meanwhile, which another mode would take for a part of the capture.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return result, graph.replay, graph.pool()


@dataclass(frozen=True)
class Captured:
    """Holds a pass that was captured, and the tensors that it reads and writes."""

    inputs: Sequence[Tensor]
    loss: Tensor
    replay: Callable[[], None]

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        for place, tensor in zip(self.inputs, tensors):
            place.copy_(tensor)
        self.replay()
        return self.loss


class PassGraphs:
    """Captures each kind of pass once and replays it from then on.

    A kind is a shape of the batch and a share of the loss. One that has never run is run first, which builds kernels
    and makes what later passes find ready. All graphs share one pool of memory, since none runs beside another.
    """

    def __init__(self, capture: Capture = capture):
        self._capture, self._pool = capture, None
        self._captured: dict[Key, Captured] = {}
        self._warm: set[Key] = set()

    @property
    def is_active(self) -> bool:
        """Whether something was captured: gradients must stay where they are."""
        return bool(self._captured)

    def __call__(self, run: Pass, images: Batch, targets: Tensor, share: float, ready: bool) -> Tensor | None:
        """Replays run(images, targets), and captures it before where it was not; returns its loss.

        None where it has to run as it is: for the first time, or as long as it is not `ready`. The loss is overwritten
        by the next replay.
        """
        tensors = [*(images.tensors if isinstance(images, Features) else [images]), targets]
        key = share, *((t.shape, t.dtype) for t in tensors)
        if key not in self._captured:
            if not ready or key not in self._warm:
                self._warm.add(key)
                return None
            self._captured[key] = self._made(run, images, tensors)
        return self._captured[key](tensors)

    def warmed(self, run: Pass, images: Batch, targets: Tensor) -> Tensor:
        """Replays run(images, targets), which has run with such a batch before, and returns its loss."""
        loss = None
        while loss is None:
            loss = self(run, images, targets, 1.0, ready=True)
        return loss

    def _made(self, run: Pass, images: Batch, tensors: list[Tensor]) -> Captured:
        inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        batch = Features(inputs[:-1]) if isinstance(images, Features) else inputs[0]
        loss, replay, self._pool = self._capture(lambda: run(batch, inputs[-1]), self._pool)
        return Captured(inputs, loss, replay)
