"""Shares one run among several devices: the processes of `torchrun --nproc-per-node=N -m s2a_cli train ...`.

Each process takes its part of every batch (`optim.batch_size` counts the images of all processes). The gradients are
summed over the processes, so that the result is that of one process, to rounding. Only the trainable tensors' gradients
travel: 0.4 MB a step for bias tuning of ViT-B. The main process alone writes files and prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line

T = TypeVar("T")
OUT_OF_MEMORY = "s2a/out-of-memory"  # key in the store that the processes share
PATIENCE = 3.0  # seconds to wait for what another process may announce


def rank_and_world_size() -> tuple[int, int]:
    """Returns (rank, number of processes) of this process: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    """Tells whether this is the main process, which writes files."""
    return rank_and_world_size()[0] == 0


def world() -> int:
    """Returns how many processes torchrun started, as it says in the environment; 1 without it."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    """Returns a variable of the environment, which is `default` at the least. Raises UserError."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < default:
        raise UserError(
            f"{variable}={brief(text)} in the environment: expected the number that torchrun sets; unset it"
        )
    return int(text)


def _on_cuda(device: str) -> bool:
    """Tells whether torchrun started several processes, each with a GPU of its own."""
    return world() > 1 and device in ("auto", "cuda") and torch.cuda.is_available()


def own_device(device: str) -> str | None:
    """Returns the device that this process alone uses; None where torchrun's first process uses the same one."""
    if _on_cuda(device):
        return f"cuda:{_number('LOCAL_RANK', 0)}"
    return device if os.environ.get("LOCAL_RANK", "0") == "0" else None


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did, until the end of the context.

    Yields the device of this process. Raises UserError where torchrun's variables are missing or no numbers.
    """
    if world() == 1 or dist.is_initialized():
        yield device
        return
    on_cuda = _on_cuda(device)
    device = f"cuda:{_number('LOCAL_RANK', 0)}" if on_cuda else device
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except ValueError as error:  # a variable that torchrun sets, and is not there or no number
        raise UserError(f"WORLD_SIZE={world()}: {first_line(error)}; start several processes with torchrun") from None
    try:
        yield device
    finally:
        dist.destroy_process_group()


def silenced() -> contextlib.AbstractContextManager[Any]:
    """Keeps all processes but the main one from writing to stdout; each still writes errors to stderr."""
    return contextlib.redirect_stdout(io.StringIO()) if os.environ.get("RANK", "0") != "0" else contextlib.nullcontext()


def broadcast(make: Callable[[], T]) -> T:
    """Calls `make` in the main process, and returns or raises in all processes what it returned or raised."""
    if rank_and_world_size()[1] == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main_process():
        try:
            made[0] = make()
        except BaseException as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]


def gather(value: T) -> list[T]:
    """Returns what each process has, in the order of their ranks, in all of them."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Waits until all processes have come here."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def announce(text: str) -> None:
    """Tells the other processes, which see no more than a lost connection, that this one ran out of memory."""
    if rank_and_world_size()[1] > 1:
        dist.distributed_c10d._get_default_store().set(OUT_OF_MEMORY, f"process {rank_and_world_size()[0]}: {text}")


def announced() -> str | None:
    """Returns what another process announced within PATIENCE seconds, or None."""
    if rank_and_world_size()[1] == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([OUT_OF_MEMORY], timedelta(seconds=PATIENCE))
        return store.get(OUT_OF_MEMORY).decode()
    except (RuntimeError, dist.DistError):  # nothing came, or the process that keeps the store is gone
        return None


def all_reduce_sum(*values: float) -> list[float]:
    """Sums each value over all processes, in float64 and on the CPU: no GPU is waited for."""
    if rank_and_world_size()[1] == 1:
        return list(values)
    summed: Tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()
