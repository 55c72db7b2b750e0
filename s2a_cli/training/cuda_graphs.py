"""Replays the forward and backward pass of a micro-batch as a CUDA graph: one launch takes the place of hundreds.

A fast device waits for the host that launches its kernels one by one, most of all in small micro-batches and where
codes make each operator several kernels. A graph computes what was captured again, on the same addresses: images and
targets are copied to where it reads them, and it adds to gradients that stay where they are. Its kernels are those of
the pass that is launched one by one, so that results are the same. Its memory is a pool of its own, in which nothing
else can be; it is given back before a pass runs that was not captured, and for an evaluation.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2a_cli.common.errors import RunError
from s2a_cli.common.text import first_line
from s2a_cli.methods.parts.feature_head import Features

Batch = Tensor | Features
Pass = Callable[[Any, Tensor, Any], Tensor]  # (images, targets, share of the loss) -> loss, detached; adds to gradients
Capture = Callable[[Callable[[], Tensor], Any], tuple[Tensor, Callable[[], None], Any]]
Key = tuple[Any, ...]


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Returns the one stream for captures: cuBLAS keeps workspaces for every stream."""
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Makes a stream that can be captured the current one; on other devices than CUDA nothing happens."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_stream(device)
    stream = _stream(before.device_index)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
    """Captures run(), which computes nothing then.

    Returns the tensor in which its result is after a replay, what replays it, and its pool of memory, which the next
    capture may share. Raises RunError for a pass that waits for the device, and PyTorch's error where memory runs out.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = None if current == torch.cuda.default_stream() else current
    try:
        # Other threads pin batches meanwhile, which another mode would take for a part of the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    except RuntimeError as error:  # the end of a capture that failed has an error of its own
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        said = f"a step can't be captured as a CUDA graph ({first_line(first)}); set cuda_graphs=false"
        raise RunError(said) from error
    return result, graph.replay, graph.pool()


@dataclass(frozen=True)
class Captured:
    """Holds a pass that was captured, and the tensors that it reads and writes."""

    inputs: Sequence[Tensor]  # images or features, and targets
    share: Tensor
    loss: Tensor
    replay: Callable[[], None]

    def __call__(self, tensors: Sequence[Tensor], share: float) -> Tensor:
        for place, tensor in zip(self.inputs, tensors):
            place.copy_(tensor)
        self.share.fill_(share)
        self.replay()
        return self.loss


class PassGraphs:
    """Captures a pass once it has run with a batch of that shape, and replays it from then on.

    All graphs share one pool of memory, since none runs beside another.
    """

    def __init__(self, capture: Capture = capture):
        self._capture, self._pool = capture, None
        self._captured: dict[Key, Captured] = {}
        self._warm: set[Key] = set()  # shapes for which kernels are built, and what later passes find ready

    @property
    def is_active(self) -> bool:
        """Whether something is captured: gradients must stay where they are."""
        return bool(self._captured)

    def clear(self) -> None:
        """Gives back the memory of what is captured."""
        if self._captured:
            self._captured, self._pool = {}, None
            torch.cuda.empty_cache()  # does nothing without CUDA

    def __call__(self, run: Pass, images: Batch, targets: Tensor, share: float, ready: bool) -> Tensor | None:
        """Replays run(images, targets, share), and captures it before where it was not; returns its loss.

        None where it has to run as it is, beside no graph: for the first time, or as long as it is not `ready`. The
        loss is overwritten by the next replay.
        """
        tensors = [*(images.tensors if isinstance(images, Features) else [images]), targets]
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key not in self._captured:
            if not ready or key not in self._warm:
                self.clear()
                self._warm.add(key)
                return None
            self._captured[key] = self._made(run, images, tensors)
        return self._captured[key](tensors, share)

    def _made(self, run: Pass, images: Batch, tensors: list[Tensor]) -> Captured:
        inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        batch = Features(inputs[:-1]) if isinstance(images, Features) else inputs[0]
        share = torch.ones((), device=tensors[0].device)
        loss, replay, self._pool = self._capture(lambda: run(batch, inputs[-1], share), self._pool)
        return Captured(inputs, share, loss, replay)
