"""Blocks run in pieces of the batch, and with recompute=block keep only their input and run again in the backward pass.

A block maps one hidden state [B, ...] to another, sample by sample. Then running B / chunks samples at a time gives the
same result, and all of the block's temporaries shrink by `chunks`: in the forward pass, in what is computed again, and
in the backward pass. What a recomputed block keeps is its input: exact (gradient checkpointing, arXiv 1604.06174), in
bfloat16, or in b bits; everything inside is then derived from it, the block's own codes included.

Bytes kept by a recomputed block of input [B, ..., C]: grouped_size(B * ..., C, group, input bits), see codes.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s2a_cli.activations.autograd import first_order
from s2a_cli.activations.codes import grouped_size, inverse, memory_order
from s2a_cli.activations.groups import keep
from s2a_cli.config import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.mode import ActivationMode


LEAST = 1 << 20  # elements of a piece's input: smaller ones would save few MiB and cost much time


@dataclass(frozen=True)
class Probe:
    """What the graph of one sample shows of a block."""

    trained: list[Tensor]  # the trained tensors that its output depends on, wherever they live
    kept: int  # bytes for the backward pass
    unread: int  # which of its linear layers is the last and has an output that nothing in backward reads: 1, 2, ...; or 0


class BlockRunner:
    """Stands in for the forward of block number `index` while the mode is active."""

    def __init__(
        self, mode: ActivationMode, index: int, module: nn.Module, config: QuantConfig, handlers: dict[Callable, Callable]
    ):
        self.mode, self.index, self.module = mode, index, module
        self.config, self.handlers = config, handlers  # those of this block
        self._probes: dict[bool, Probe] = {}  # by whether the input has a gradient

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.inner = self.module.forward
        self.module.forward = self
        try:
            yield
        finally:
            del self.module.forward

    @functools.partial(torch.compiler.disable, recursive=False)  # compiled is what runs inside
    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        config, others = self.config, [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        whole = any(other.dim() and other.shape[0] == len(x) for other in others)  # may hold a part for each sample
        size = len(x) if whole else piece_size(x, config.chunks)
        run = functools.partial(self._run, self.inner, args, kwargs)
        if not torch.is_grad_enabled():
            return in_pieces(run, x, size)
        if any(other.requires_grad for other in others) or (config.recompute == "none" and size >= len(x)):
            return run(x)
        probe = self._probe(run, x)
        if not probe.trained and not x.requires_grad:
            with torch.no_grad():
                return in_pieces(run, x, size)
        if config.recompute == "none" or probe.kept <= input_bytes(x[:1], config):
            return torch.cat([run(piece) for piece in x.split(size)]) if size < len(x) else run(x)
        replay = Replay(run, self, x.device, probe.unread)
        return Recompute.apply(x, replay, size, *probe.trained)

    def _run(self, inner: Callable[..., Tensor], args: tuple, kwargs: dict, x: Tensor, unread: int = 0) -> Tensor:
        with self.mode.inside(self, unread):
            return inner(x, *args, **kwargs)

    def _probe(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Probe:
        if x.requires_grad not in self._probes:
            state = random_state(x.device)
            self._probes[x.requires_grad] = probe(self.mode, self.module, run, x)
            set_random_state(x.device, state)
        return self._probes[x.requires_grad]


def probe(mode: ActivationMode, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Probe:
    """Runs the block on the first sample of x with a graph."""
    own = {t.shape for t in (*module.parameters(), *module.buffers())}  # autocast saves copies of weights
    kept: dict[int, int] = {}  # bytes by storage
    last = -1  # how many products were over when something was last saved

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        storage = tensor.untyped_storage()
        if tensor.shape not in own:
            kept[storage._cdata], last = storage.nbytes(), mode.linears
        return tensor.detach()  # not itself: a node that holds its own output is never freed

    sample = x[:1].detach().clone().requires_grad_(x.requires_grad)
    with mode.calibration.paused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(sample)
    trained = [leaf for leaf in leaves(out) if leaf is not sample]
    return Probe(trained, sum(kept.values()), mode.linears if last < mode.linears else 0)


class Replay:
    """Runs a block again as it ran the first time: the same random numbers, autocast and mode."""

    def __init__(self, run: Callable[..., Tensor], block: BlockRunner, device: torch.device, unread: int):
        self.run, self.block, self.device, self.unread = run, block, device, unread
        self.state = random_state(device)
        kind = device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = functools.partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gives the block, to be called with gradients on the pieces in their first order."""

        def again(piece: Tensor) -> Tensor:
            with torch.enable_grad(), self.autocast(), self.block.mode.again():
                return self.run(piece, unread=self.unread)

        before = random_state(self.device)
        set_random_state(self.device, self.state)
        try:
            yield again
        finally:
            set_random_state(self.device, before)


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


def unread_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return UnreadLinear.apply(x, weight, bias, dtype)


class Recompute(torch.autograd.Function):
    """y = block(x), `size` samples at a time; kept is x in config.input bits."""

    @staticmethod
    def forward(ctx, x: Tensor, replay: Replay, size: int, *trained: Tensor) -> Tensor:
        config, calibration = replay.block.config, replay.block.mode.calibration
        ctx.replay, ctx.size, ctx.trained, ctx.dtype = replay, size, trained, x.dtype
        ctx.grouped, kept = None, [x]
        if config.input == 16:
            kept = [x.to(torch.bfloat16)]
        elif config.input is not None:
            channels = functools.partial(calibration.channels, f"{replay.block.index}.input")
            ctx.grouped, *kept = keep(x, config.input, config.group, seed=calibration.seed(), calibrated=channels)
        ctx.save_for_backward(*kept)
        return in_pieces(replay.run, x, size)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        kept, needs_input = ctx.saved_tensors, ctx.needs_input_grad[0]
        totals: list[Tensor | None] = [None] * len(ctx.trained)
        dx = None
        with ctx.replay() as again:
            for start in range(0, len(grad), ctx.size):
                part = slice(start, min(start + ctx.size, len(grad)))
                if ctx.grouped:
                    piece = ctx.grouped.decode(*kept, ctx.dtype, part.start, part.stop)
                else:
                    piece = kept[0][part].to(ctx.dtype).detach()
                piece.requires_grad_(needs_input)
                inputs = [*([piece] if needs_input else []), *ctx.trained]
                found = list(torch.autograd.grad(again(piece), inputs, grad[part], allow_unused=True))
                if needs_input:
                    dx = written(dx, found.pop(0), part, len(grad))
                for index, new in enumerate(found):
                    totals[index] = new if totals[index] is None else totals[index].add_(new)
        return dx, None, None, *totals


def input_bytes(x: Tensor, config: QuantConfig) -> int:
    """Bytes that a recomputed block keeps for this input."""
    if config.input is None:
        return x.numel() * x.element_size()
    return 2 * x.numel() if config.input == 16 else grouped_size(x.numel() // x.shape[-1], x.shape[-1], config.group, config.input)


def piece_size(x: Tensor, chunks: int) -> int:
    """Samples in a piece: there are at most `chunks` pieces, and none but the last is small without need."""
    least = -(-LEAST * len(x) // max(x.numel(), 1))
    return min(len(x), max(-(-len(x) // chunks), least))


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """run(x), `size` samples at a time, without a graph."""
    out = None
    for start in range(0, len(x), size):
        part = slice(start, min(start + size, len(x)))
        out = written(out, run(x[part]), part, len(x))
    return out


def written(whole: Tensor | None, piece: Tensor, part: slice, samples: int) -> Tensor:
    """`piece` as the samples `part` of `whole`, which is made, laid out like the piece, where it is None."""
    if whole is None:
        if len(piece) == samples:
            return piece
        order = memory_order(piece)
        whole = piece.new_empty([piece.shape[d] if d else samples for d in order]).permute(inverse(order))
    whole[part] = piece
    return whole


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that operators on this device draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def leaves(out: Tensor) -> list[Tensor]:
    """The tensors without a history whose gradients a backward pass from `out` would find, in a fixed order."""
    found, seen, todo = [], set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(function for function, _ in node.next_functions)
    return found
