"""Adds up gradients of several processes in flat buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2a_cli.common.dataless import Dataless, is_dataless
from s2a_cli.common.distributed import broadcast, rank_and_world_size

BUCKET = 25 * 2**20  # bytes; the size that DistributedDataParallel begins with
IN_FLIGHT = 2  # buckets at most whose copies are alive


@dataclass
class Bucket:
    """Holds parameters whose gradients are added up at once."""

    parameters: list[nn.Parameter]
    waits_for: int = 0  # how many of them have no gradient of this step's last backward pass yet
    flat: Tensor | None = None
    work: dist.Work | None = field(default=None, repr=False)

    def start(self) -> None:
        self.flat = torch.cat([gradient(p).reshape(-1) for p in self.parameters])
        if not is_dataless(self.flat):  # a prediction is each process's own
            self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self) -> None:
        if self.work:
            self.work.wait()
        assert self.flat is not None
        for p, total in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            gradient(p).copy_(total.view_as(p))
        self.flat = self.work = None


def gradient(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


class GradientSum:
    """Adds up the gradients of some parameters over all processes; does nothing where there is but one.

    The first step adds them up behind the backward pass, where it sees in which order gradients come. From then on each
    bucket goes out as soon as its last gradient is there, in one order in all processes. A gradient that is there
    before the step's last backward pass (of an auxiliary head, of an earlier micro-batch) goes with its bucket;
    parameters without a gradient are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self._buckets: list[Bucket] | None = None  # in the order in which gradients came
        self._came: list[int] = []  # numbers of parameters, in this step's last backward pass
        self._started: list[Bucket] = []

    def fits(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Returns whether these are the parameters that it was made for."""
        trained = [p for p in parameters if p.requires_grad]
        return len(trained) == len(self.parameters) and all(a is b for a, b in zip(trained, self.parameters))

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Surrounds the last backward pass of a step; behind it gradients are the sums."""
        if rank_and_world_size()[1] == 1:
            yield
            return
        self._came, self._started = [], []
        owner: dict[int, Bucket] = {}
        for bucket in self._buckets or ():
            bucket.waits_for = len(bucket.parameters)
            owner |= dict.fromkeys(map(id, bucket.parameters), bucket)

        def comes(number: int, parameter: nn.Parameter) -> None:
            self._came.append(number)
            if bucket := owner.get(id(parameter)):
                bucket.waits_for -= 1
                self._start_those_that_are_full()

        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, n=n: comes(n, p)) for n, p in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._rest()

    def _start_those_that_are_full(self) -> None:
        for bucket in (self._buckets or [])[len(self._started) :]:
            if bucket.waits_for:
                return
            self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        if len(self._started) >= IN_FLIGHT:
            self._started[-IN_FLIGHT].finish()
        bucket.start()
        self._started.append(bucket)

    def _rest(self) -> None:
        """Starts what was not full, waits for all, and the first time learns in which order gradients come."""
        done = {id(p) for bucket in self._started for p in bucket.parameters}
        for bucket in _filled([p for p in self.parameters if p.grad is not None and id(p) not in done]):
            self._start(bucket)
        for bucket in self._started[-IN_FLIGHT:]:
            bucket.finish()
        if self._buckets is None:
            came = self._came if Dataless.active else broadcast(lambda: self._came)
            self._buckets = _filled([self.parameters[number] for number in came])


def _filled(parameters: list[nn.Parameter]) -> list[Bucket]:
    """Returns buckets of about BUCKET bytes, each of one type and device, in this order."""
    buckets: list[Bucket] = []
    size = 0
    for p in parameters:
        like = buckets[-1].parameters[0] if buckets else None
        alike = like is not None and (p.dtype, p.device) == (like.dtype, like.device)
        if not alike or size + p.numel() * p.element_size() > BUCKET:
            buckets.append(Bucket([]))
            size = 0
        buckets[-1].parameters.append(p)
        size += p.numel() * p.element_size()
    return buckets
