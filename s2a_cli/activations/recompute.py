"""Keeps only the inputs of a block, and runs it again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.autograd import first_order
from s2a_cli.activations.ops.linear_conv import FrozenLinear
from s2a_cli.activations.quant.groupwise import GroupwiseLayout, keep_quantized, write_chunk
from s2a_cli.activations.quant.packing import groupwise_size
from s2a_cli.activations.random_numbers import SampleDraws, batch_chunks, random_state, set_random_state
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.checkpointing import Call


class Recomputation:
    """Runs a block again as it ran the first time: with the same random numbers, autocast and mode.

    unread: the linear layer whose output backward does not read, counted from 1; or 0.
    """

    def __init__(self, call: Call, device: torch.device, unread: int):
        self.call, self.device, self.unread = call, device, unread
        self.state = random_state(device)
        kind = device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = functools.partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)

    @contextmanager
    def __call__(self) -> Iterator[Callable[[list[Tensor], SampleDraws | None], list[Tensor]]]:
        """Gives the block, to be called with gradients on the batch chunks in their first order."""

        def again(inputs: list[Tensor], draws: SampleDraws | None) -> list[Tensor]:
            with torch.enable_grad(), self.autocast(), self.call.block.mode.again():
                return self.call(inputs, self.unread, draws)

        before = random_state(self.device)
        set_random_state(self.device, self.state)
        try:
            yield again
        finally:
            set_random_state(self.device, before)


class Recompute(torch.autograd.Function):
    """Computes outputs = block(inputs), `size` samples at a time.

    Of the inputs the first `recomputation.call.states` hold samples, and are kept in config.input bits. Others, which
    there are only where the batch is whole, are kept as they are.
    """

    @staticmethod
    def forward(ctx, recomputation: Recomputation, size: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        call, inputs = recomputation.call, tensors[:count]
        ctx.recomputation, ctx.size, ctx.trained = recomputation, size, tensors[count:]
        ctx.versions, ctx.parameters = _versions(ctx.trained), _parameters(call)
        ctx.dtypes, ctx.samples = [x.dtype for x in inputs], len(inputs[0])
        ctx.layouts, kept = [], []
        for index, x in enumerate(inputs):
            layout, *stored = _stored(x, call, index) if index < call.states else (None, x)
            ctx.layouts.append((layout, len(stored)))
            kept += stored
        ctx.save_for_backward(*kept)
        # Without autocast's cache: older PyTorch would reuse a cast from here, where there is no graph, in a block that
        # is not recomputed and shares the weight, which would get no gradient from it.
        with recomputation.autocast():
            outputs = in_batch_chunks(call, list(inputs), size)
        if outputs is None:  # of one sample it can't be seen
            raise UserError(
                f"block {call.block.index} ({type(call.block.module).__name__}) returns tensors that do not begin with"
                " the batch, so that it can't run in chunks: set chunks=1"
            )
        # A view of what was made in here, or of an input, could not be changed in place, as a block's output can be.
        return tuple(y.clone() if any(_share(y, x) for x in inputs) else y.detach() for y in outputs)

    @staticmethod
    @first_order
    def backward(ctx, *grads: Tensor):
        if ctx.versions != _versions(ctx.trained) or ctx.parameters != _parameters(ctx.recomputation.call):
            raise RuntimeError(
                f"block {ctx.recomputation.call.block.index}: its parameters were changed or replaced after its forward"
                " pass (torch.func.functional_call does so); a block that is recomputed reads them again in backward"
            )
        needed, kept = ctx.needs_input_grad[3 : 3 + len(ctx.dtypes)], list(ctx.saved_tensors)
        stored = [(layout, [kept.pop(0) for _ in range(count)]) for layout, count in ctx.layouts]
        found: list[Tensor | None] = []
        totals: list[Tensor | None] = [None] * len(ctx.trained)
        own: set[int] = set()
        with ctx.recomputation() as again:
            for chunk, draws in batch_chunks(ctx.samples, ctx.size):
                inputs = [
                    _read(*x, dtype, chunk).requires_grad_(need) for x, dtype, need in zip(stored, ctx.dtypes, needed)
                ]
                chunk_grads = [grad[chunk] if ctx.size < ctx.samples else grad for grad in grads]
                of_inputs, of_trained = _gradients(
                    lambda inputs, draws=draws: again(inputs, draws), inputs, ctx.trained, chunk_grads
                )
                del inputs, chunk_grads
                _write(found, of_inputs, chunk, ctx.samples)
                _add(totals, of_trained, own)
                del of_inputs, of_trained
        return None, None, None, *found, *totals


def _gradients(
    run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], trained: tuple[Tensor, ...], grads: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Returns the gradients of the inputs (None for those that need none), and of what trains."""
    pairs = [(y, grad) for y, grad in zip(run(inputs), grads) if y.requires_grad]
    wanted = [*(x for x in inputs if x.requires_grad), *trained]
    new: list[Tensor | None] = [None] * len(wanted)
    if pairs:
        outputs, of_outputs = zip(*pairs)
        with _without_hooks(trained):
            new = list(torch.autograd.grad(outputs, wanted, of_outputs, allow_unused=True))
    return [new.pop(0) if x.requires_grad else None for x in inputs], new


@contextmanager
def _without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leaves out hooks on these tensors' gradients within: they are to see the sum, outside, and once."""
    hooks = [t._backward_hooks for t in tensors if t._backward_hooks]
    before = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, own in zip(hooks, before):
            each.update(own)


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Returns how often each was changed in place."""
    return [] if torch.compiler.is_compiling() else [t._version for t in tensors]


def _parameters(call: Call) -> list[int]:
    """Returns which tensors are the parameters of a block now."""
    return [id(p) for p in call.block.module.parameters()]


def _add(totals: list[Tensor | None], new: list[Tensor | None], own: set[int]) -> None:
    """Adds gradients to the totals, in place to those whose index is in `own`: they were made here.

    What autograd returns may be the gradient of something else, too.
    """
    for index, grad in enumerate(new):
        total = totals[index]
        if total is None or grad is None:
            totals[index] = grad if total is None else total
        elif index in own:
            total.add_(grad)
        else:
            totals[index] = total + grad
            own.add(index)


def _stored(x: Tensor, call: Call, index: int) -> tuple:
    """Returns what is kept of a hidden state: its layout (None: as it is), and tensors."""
    config, calibration = call.block.config, call.block.mode.calibration
    if config.input is None:
        return None, x
    if config.input == 16:
        return None, x.to(torch.bfloat16)
    site = f"{call.name}:input" if index == 0 else f"{call.name}:input.{index + 1}"
    channels = functools.partial(calibration.channels, site)
    return keep_quantized(x, config.input, config.group, seed=calibration.seed(), calibrated=channels)


def _read(layout: GroupwiseLayout | None, stored: list[Tensor], dtype: torch.dtype, chunk: slice) -> Tensor:
    """Returns the samples of a batch chunk from what is kept."""
    if layout is not None:
        packed, scales = stored
        return layout.dequantize(packed, scales, dtype, chunk.start, chunk.stop)
    (x,) = stored
    return (x[chunk] if chunk.stop - chunk.start < len(x) else x).to(dtype).detach()


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def input_bytes(x: Tensor, config: QuantConfig) -> int:
    """Returns the bytes that a recomputed block keeps for this input."""
    if config.input is None:
        return x.numel() * x.element_size()
    return (
        2 * x.numel()
        if config.input == 16
        else groupwise_size(x.numel() // x.shape[-1], x.shape[-1], config.group, config.input)
    )


def splits(outputs: list[Tensor], samples: int | None) -> bool:
    """Returns whether what a block returned for so many samples can be put together from batch chunks.

    samples: None for whether it could be recomputed.
    """
    return bool(outputs) and all(
        y.is_floating_point() and (samples is None or (y.dim() and len(y) == samples)) for y in outputs
    )


def in_batch_chunks(call: Call, inputs: list[Tensor], size: int) -> list[Tensor] | None:
    """Returns call(inputs), `size` samples at a time, without a graph; None where results are not split by sample."""
    samples = len(inputs[0])
    whole: list[Tensor | None] = []
    for chunk, draws in batch_chunks(samples, size):
        outputs = call(inputs if size >= samples else [x[chunk] for x in inputs], draws=draws)
        if size < samples and not splits(outputs, chunk.stop - chunk.start):
            return None
        _write(whole, outputs, chunk, samples)
    return [y for y in whole if y is not None]


def _write(whole: list[Tensor | None], results: list, chunk: slice, samples: int) -> None:
    """Writes each result of a batch chunk as these samples of one of `whole`.

    Results may be None. Empties `results`, so that none of them stays alive.
    """
    whole += [None] * (len(results) - len(whole))
    for index, result in enumerate(results):
        if result is not None:
            whole[index] = write_chunk(whole[index], result, chunk, samples)
    results.clear()


def unread_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Does what F.linear does where nothing reads its output; with a weight that trains it is F.linear itself."""
    if weight.requires_grad:
        return F.linear(input, weight, bias)
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns what has the right shape and dtype, and nothing in it."""
        return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)

    return FrozenLinear.apply(input, weight, bias, run)
