"""A block whose inputs alone are kept, and which runs again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.quant.grouped import keep, written
from s2a_cli.activations.quant.packing import grouped_size
from s2a_cli.activations.random_numbers import Draws, parts, random_state, set_random_state
from s2a_cli.config.schema import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.checkpointing import Call


class Replay:
    """Runs a block again as it ran the first time: the same random numbers, autocast and mode."""

    def __init__(self, call: Call, device: torch.device, unread: int):
        self.call, self.device, self.unread = call, device, unread
        self.state = random_state(device)
        kind = device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = functools.partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)

    @contextmanager
    def __call__(self) -> Iterator[Callable[[list[Tensor], Draws | None], list[Tensor]]]:
        """Gives the block, to be called with gradients on the pieces in their first order."""

        def again(inputs: list[Tensor], draws: Draws | None) -> list[Tensor]:
            with torch.enable_grad(), self.autocast(), self.call.block.mode.again():
                return self.call(inputs, self.unread, draws)

        before = random_state(self.device)
        set_random_state(self.device, self.state)
        try:
            yield again
        finally:
            set_random_state(self.device, before)


class Recompute(torch.autograd.Function):
    """outputs = block(inputs), `size` samples at a time.

    Of the inputs the first `replay.call.states` hold samples, and are kept in config.input bits; others, which there
    are only where the batch is in one piece, as they are.
    """

    @staticmethod
    def forward(ctx, replay: Replay, size: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        call, inputs = replay.call, tensors[:count]
        ctx.replay, ctx.size, ctx.trained = replay, size, tensors[count:]
        ctx.dtypes, ctx.samples = [x.dtype for x in inputs], len(inputs[0])
        ctx.grouped, kept = [], []
        for index, x in enumerate(inputs):
            grouped, *stored = _stored(x, call, index) if index < call.states else (None, x)
            ctx.grouped.append((grouped, len(stored)))
            kept += stored
        ctx.save_for_backward(*kept)
        outputs = in_pieces(call, list(inputs), size)
        # A view of what was made in here, or of an input, could not be changed in place, as the output of a block can
        # be.
        return tuple(y.clone() if any(_share(y, x) for x in inputs) else y.detach() for y in outputs)

    @staticmethod
    @first_order
    def backward(ctx, *grads: Tensor):
        needed, kept = ctx.needs_input_grad[3 : 3 + len(ctx.dtypes)], list(ctx.saved_tensors)
        stored = [(grouped, [kept.pop(0) for _ in range(count)]) for grouped, count in ctx.grouped]
        found: list[Tensor | None] = []
        totals: list[Tensor | None] = [None] * len(ctx.trained)
        own: set[int] = set()
        with ctx.replay() as again:
            for part, draws in parts(ctx.samples, ctx.size):
                inputs = [
                    _read(*x, dtype, part).requires_grad_(need) for x, dtype, need in zip(stored, ctx.dtypes, needed)
                ]
                parts_of_grads = [grad[part] if ctx.size < ctx.samples else grad for grad in grads]
                of_inputs, of_trained = _gradients(
                    lambda inputs, draws=draws: again(inputs, draws), inputs, ctx.trained, parts_of_grads
                )
                del inputs, parts_of_grads
                _write(found, of_inputs, part, ctx.samples)
                _add(totals, of_trained, own)
                del of_inputs, of_trained
        return None, None, None, *found, *totals


def _gradients(
    run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], trained: tuple[Tensor, ...], grads: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the inputs that need one (None for others), and of what trains."""
    pairs = [(y, grad) for y, grad in zip(run(inputs), grads) if y.requires_grad]
    wanted = [*(x for x in inputs if x.requires_grad), *trained]
    new = (
        list(torch.autograd.grad([y for y, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True))
        if pairs
        else [None] * len(wanted)
    )
    return [new.pop(0) if x.requires_grad else None for x in inputs], new


def _add(totals: list[Tensor | None], new: list[Tensor | None], own: set[int]) -> None:
    """Adds to the totals; in place to those that were made here alone: what autograd returns may be another's gradient,
    too.
    """
    for index, piece in enumerate(new):
        total = totals[index]
        if total is None or piece is None:
            totals[index] = piece if total is None else total
        elif index in own:
            total.add_(piece)
        else:
            totals[index] = total + piece
            own.add(index)


def _stored(x: Tensor, call: Call, index: int) -> tuple:
    """What is kept of a hidden state: how to read it, and tensors."""
    config, calibration = call.block.config, call.block.mode.calibration
    if config.input is None:
        return None, x
    if config.input == 16:
        return None, x.to(torch.bfloat16)
    site = f"{call.name}:input" if index == 0 else f"{call.name}:input.{index + 1}"
    channels = functools.partial(calibration.channels, site)
    return keep(x, config.input, config.group, seed=calibration.seed(), calibrated=channels)


def _read(grouped, stored: list[Tensor], dtype: torch.dtype, part: slice) -> Tensor:
    """The samples of a part of what is kept."""
    if grouped is not None:
        return grouped.decode(*stored, dtype, part.start, part.stop)
    x = stored[0]
    return (x[part] if part.stop - part.start < len(x) else x).to(dtype).detach()


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def input_bytes(x: Tensor, config: QuantConfig) -> int:
    """Bytes that a recomputed block keeps for this input."""
    if config.input is None:
        return x.numel() * x.element_size()
    return (
        2 * x.numel()
        if config.input == 16
        else grouped_size(x.numel() // x.shape[-1], x.shape[-1], config.group, config.input)
    )


def splits(outputs: list[Tensor], samples: int | None) -> bool:
    """Whether what a block returned for so many samples can be put together from pieces; None: whether it could be
    recomputed.
    """
    return bool(outputs) and all(
        y.is_floating_point() and (samples is None or (y.dim() and len(y) == samples)) for y in outputs
    )


def in_pieces(call: Call, inputs: list[Tensor], size: int) -> list[Tensor] | None:
    """call(inputs), `size` samples at a time, without a graph; None where what it returns is not split by sample."""
    samples = len(inputs[0])
    whole: list[Tensor | None] = []
    for part, draws in parts(samples, size):
        outputs = call(inputs if size >= samples else [x[part] for x in inputs], draws=draws)
        if size < samples and not splits(outputs, part.stop - part.start):
            return None
        _write(whole, outputs, part, samples)
    return whole


def _write(whole: list[Tensor | None], pieces: list[Tensor | None], part: slice, samples: int) -> None:
    """Each piece as the samples `part` of one of `whole`; empties `pieces`, so that none is alive behind it."""
    whole += [None] * (len(pieces) - len(whole))
    for index, piece in enumerate(pieces):
        if piece is not None:
            whole[index] = written(whole[index], piece, part, samples)
    pieces.clear()


class UnreadLinear(torch.autograd.Function):
    """A frozen linear layer in a recomputation, whose output has the right shape and dtype and nothing in it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        dx = grad.matmul(weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None


def unread_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear whose output nothing reads; with a weight that trains it is F.linear itself."""
    if weight.requires_grad:
        return F.linear(input, weight, bias)
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    return UnreadLinear.apply(input, weight, bias, dtype)
