"""Blocks run in pieces of the batch, and with recompute=block keep only their input and run again in the backward pass.

A block maps one hidden state [B, ...] to another, sample by sample. Then running B / chunks samples at a time gives the
same result, and all of the block's temporaries shrink by `chunks`: in the forward pass, in what is computed again, and
in the backward pass. What a recomputed block keeps is its input: exact (gradient checkpointing, arXiv 1604.06174), in
bfloat16, or in b bits; everything inside is then derived from it, the block's own codes included.

Random numbers are the same when a block is computed again. Against a batch in one piece, stochastic depth drops the same
samples; an elementwise dropout in pieces has other draws of the same distribution.

Bytes kept by a recomputed block of input [B, ..., C]: grouped_size(B * ..., C, group, input bits), see codes.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from s2a_cli.activations.autograd import first_order
from s2a_cli.activations.codes import grouped_size, memory_order
from s2a_cli.activations.groups import keep
from s2a_cli.activations.torch_checkpoint import refuse_checkpointing
from s2a_cli.config import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.mode import ActivationMode


LEAST = 1 << 20  # elements of a piece's input: smaller ones would save few MiB and cost much time
_patching = threading.Lock()


def runners_of(mode: ActivationMode, blocks: Iterable[nn.Module]) -> list[BlockRunner]:
    """One for each block. Raises ValueError for a block that is listed twice with different settings."""
    found: dict[nn.Module, BlockRunner] = {}
    for index, block in enumerate(blocks):
        config = mode.config.of_block(index)
        known = found.setdefault(block, BlockRunner(mode, index, block, config))
        if known.config != config:
            raise ValueError(f"blocks {known.index} and {index} are one module: they can't have different settings")
    return list(found.values())


class BlockRunner:
    """Stands in for the forward of block number `index` in the threads that are within the mode."""

    def __init__(self, mode: ActivationMode, index: int, module: nn.Module, config: QuantConfig):
        self.mode, self.index, self.module = mode, index, module
        self.config, self.handlers = config, mode.handlers_of(config)  # those of this block
        self._probes: dict[tuple, Probe] = {}
        self._users = 0  # threads that are within the mode

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces the module's forward, then puts back what was there: the class's, or one of the instance's own."""
        with _patching:
            if not self._users:
                own = self.module.__dict__.get("forward")
                if isinstance(own, BlockRunner):
                    raise RuntimeError(f"block {self.index} is within another remember(...), in another thread")
                self.inner, self._own = self.module.forward, own
                self.module.forward = self
            self._users += 1
        try:
            yield
        finally:
            with _patching:
                self._users -= 1
                if not self._users and self.module.__dict__.get("forward") is self:
                    if self._own is None:
                        del self.module.forward
                    else:
                        self.module.forward = self._own

    def __deepcopy__(self, memo: dict) -> Any:
        raise RuntimeError("a model can't be copied within remember(...): copy it before or after")

    def __call__(self, *args, **kwargs) -> Any:
        if not self.mode.thread.on:  # in a thread of its own
            return self.inner(*args, **kwargs)
        refuse_checkpointing(self.mode.thread.grad)
        name = self.mode.sites.entry(f"block {self.index}")
        x, *others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)] or [torch.empty(0)]

        def as_it_is() -> Any:
            with self.mode.inside(self, name):
                return self.inner(*args, **kwargs)

        if not x.dim() or not len(x):
            return as_it_is()
        call, config = Call(self, args, kwargs, x, name), self.config
        whole = any(other.dim() and len(other) == len(x) for other in others)  # may hold a part for each sample
        size = len(x) if whole else piece_size(x, config.chunks)
        if not torch.is_grad_enabled():
            return call.returned(in_pieces(call, x, size)) if size < len(x) else as_it_is()
        if any(other.requires_grad for other in others) or (config.recompute == "none" and size >= len(x)):
            return as_it_is()
        probe = self._probe(call, x, len(x) if whole else 1)
        if probe.changes_input:
            return as_it_is()
        if not probe.trained and not x.requires_grad:
            with torch.no_grad():
                return call.returned(in_pieces(call, x, size))
        if config.recompute == "none" or probe.kept <= input_bytes(x[:1], config):
            if size >= len(x):
                return as_it_is()
            return call.returned(torch.cat([call(x[part], draws=draws) for part, draws in parts(len(x), size)]))
        return call.returned(Recompute.apply(x, Replay(call, x.device, probe.unread), size, *probe.trained))

    def _probe(self, call: Call, x: Tensor, samples: int) -> Probe:
        autocast = torch.is_autocast_enabled(x.device.type)
        key = x.requires_grad, x.dtype, x.shape[1:], self.module.training, autocast, samples == 1
        if key not in self._probes or not self._probes[key].holds():
            state, linears = random_state(x.device), self.mode.thread.linears
            self._probes[key] = probe(call, x[:samples])
            set_random_state(x.device, state)
            self.mode.thread.linears = linears
        return self._probes[key]


class Call:
    """One call of a block, which can be run on pieces of its hidden state: the first tensor among its arguments."""

    def __init__(self, block: BlockRunner, args: tuple, kwargs: dict, hidden: Tensor, name: str):
        self.block, self.name, self.inner = block, name, block.inner
        given, self._spec = tree_flatten((args, kwargs))
        self._given = [None if x is hidden else x for x in given]  # without it: a call that is to be made again outlives it
        self._places = [i for i, x in enumerate(given) if x is hidden]
        self._beside: tuple[list, Any] | None = None  # what the block returns beside its hidden state, and the structure

    def __call__(self, x: Tensor, unread: int = 0, draws: Draws | None = None) -> Tensor:
        """The hidden state that the block makes of x."""
        given = list(self._given)
        for place in self._places:
            given[place] = x
        args, kwargs = tree_unflatten(given, self._spec)
        with self.block.mode.inside(self.block, self.name, unread, draws):
            out = self.inner(*args, **kwargs)
        if isinstance(out, Tensor):
            return out
        found, spec = tree_flatten(out)
        hidden = [x for x in found if isinstance(x, Tensor)]
        if len(hidden) != 1:
            raise RuntimeError(
                f"block {self.block.index} returns {len(hidden)} tensors: quant.recompute and quant.chunks are for blocks that return one"
            )
        self._beside = [None if x is hidden[0] else x for x in found], spec
        return hidden[0]

    def returned(self, hidden: Tensor) -> Any:
        """What the block returns whose hidden state this is."""
        if self._beside is None:
            return hidden
        beside, spec = self._beside
        place = next(i for i, x in enumerate(beside) if x is None)
        return tree_unflatten([*beside[:place], hidden, *beside[place + 1 :]], spec)


@dataclass(frozen=True)
class Probe:
    """What the graph of a sample shows of a block."""

    trained: list[Tensor]  # the trained tensors that its output depends on, wherever they live
    kept: float  # bytes for the backward pass, of one sample
    unread: int  # which of its linear layers is the last and has an output that nothing in backward reads: 1, 2, ...; or 0
    changes_input: bool  # in place
    flags: list[tuple[Tensor, bool]]  # the parameters that it read, and whether they were trained

    def holds(self) -> bool:
        """Whether the same parameters are trained as when it was made."""
        return all(parameter.requires_grad == flag for parameter, flag in self.flags)


class Reads(TorchFunctionMode):
    """Collects the parameters that functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, nn.Parameter):
                self.found[id(x)] = x
        return func(*args, **(kwargs or {}))


def probe(call: Call, x: Tensor) -> Probe:
    """Runs the block on these samples with a graph."""
    mode, module = call.block.mode, call.block.module
    thread, begun = mode.thread, mode.thread.linears
    own = {t.shape for t in (*module.parameters(), *module.buffers())}  # autocast saves copies of weights
    kept: dict[int, int] = {}  # bytes by storage
    last = begun - 1  # how many linear layers were over when something was last saved

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        storage = tensor.untyped_storage()
        if tensor.shape not in own:
            kept[storage._cdata], last = storage.nbytes(), thread.linears
        return tensor.detach()  # not itself: a node that holds its own output is never freed

    leaf, reads = x.detach().requires_grad_(x.requires_grad), Reads()
    with mode.calibration.paused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), reads:
        sample = leaf.clone()
        version = sample._version
        out = call(sample)
    reads.found.update((id(p), p) for p in module.parameters())
    return Probe(
        trained=[tensor for tensor in leaves(out) if tensor is not leaf],
        kept=sum(kept.values()) / len(x),
        unread=thread.linears - begun if last < thread.linears else 0,
        changes_input=sample._version != version,
        flags=[(p, p.requires_grad) for p in reads.found.values()],
    )


class Replay:
    """Runs a block again as it ran the first time: the same random numbers, autocast and mode."""

    def __init__(self, call: Call, device: torch.device, unread: int):
        self.call, self.device, self.unread = call, device, unread
        self.state = random_state(device)
        kind = device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = functools.partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Tensor, Draws | None], Tensor]]:
        """Gives the block, to be called with gradients on the pieces in their first order."""

        def again(piece: Tensor, draws: Draws | None) -> Tensor:
            with torch.enable_grad(), self.autocast(), self.call.block.mode.again():
                return self.call(piece, self.unread, draws)

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


def unread_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear whose output nothing reads; with a weight that trains it is F.linear itself."""
    if weight.requires_grad:
        return F.linear(input, weight, bias)
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    return UnreadLinear.apply(input, weight, bias, dtype)


class Recompute(torch.autograd.Function):
    """y = block(x), `size` samples at a time; kept is x in config.input bits."""

    @staticmethod
    def forward(ctx, x: Tensor, replay: Replay, size: int, *trained: Tensor) -> Tensor:
        call = replay.call
        config, calibration = call.block.config, call.block.mode.calibration
        ctx.replay, ctx.size, ctx.trained, ctx.dtype = replay, size, trained, x.dtype
        ctx.grouped, kept = None, [x]
        if config.input == 16:
            kept = [x.to(torch.bfloat16)]
        elif config.input is not None:
            channels = functools.partial(calibration.channels, f"{call.name}:input")
            ctx.grouped, *kept = keep(x, config.input, config.group, seed=calibration.seed(), calibrated=channels)
        ctx.save_for_backward(*kept)
        out = in_pieces(call, x, size)
        # A view of what was made in here, or of x, could not be changed in place, as the output of a block can be.
        return out.clone() if shares_storage(out, x) else out.detach()

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        kept, needs_input = ctx.saved_tensors, ctx.needs_input_grad[0]
        totals: list[Tensor | None] = [None] * len(ctx.trained)
        own: set[int] = set()  # totals that were made here: what autograd returns may be the gradient of something else, too
        dx = None
        with ctx.replay() as again:
            for part, draws in parts(len(grad), ctx.size):
                if ctx.grouped:
                    piece = ctx.grouped.decode(*kept, ctx.dtype, part.start, part.stop)
                else:
                    piece = kept[0][part].to(ctx.dtype).detach()
                piece.requires_grad_(needs_input)
                inputs = [*([piece] if needs_input else []), *ctx.trained]
                found = list(torch.autograd.grad(again(piece, draws), inputs, grad[part], allow_unused=True))
                if needs_input:
                    dx = written(dx, found.pop(0), part, len(grad))
                for index, new in enumerate(found):
                    total = totals[index]
                    if total is None or new is None:
                        totals[index] = new if total is None else total
                    elif index in own:
                        total.add_(new)
                    else:
                        totals[index] = total + new
                        own.add(index)
        return dx, None, None, *totals


def shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def input_bytes(x: Tensor, config: QuantConfig) -> int:
    """Bytes that a recomputed block keeps for this input."""
    if config.input is None:
        return x.numel() * x.element_size()
    return 2 * x.numel() if config.input == 16 else grouped_size(x.numel() // x.shape[-1], x.shape[-1], config.group, config.input)


def piece_size(x: Tensor, chunks: int) -> int:
    """Samples in a piece: there are at most `chunks` pieces, and none but the last is small without need."""
    least = -(-LEAST * len(x) // max(x.numel(), 1))
    return min(len(x), max(-(-len(x) // chunks), least))


class Draws:
    """The random numbers of a block that runs in pieces: one a sample are drawn for the whole batch, as without pieces."""

    def __init__(self, samples: int):
        self.samples, self.part = samples, slice(0)
        self._drawn: list[Tensor] = []
        self._next = 0

    def begin(self, part: slice) -> None:
        self.part, self._next = part, 0

    def bernoulli_(self, input: Tensor, p: Any = 0.5, **kwargs: Any) -> Tensor:
        """Tensor.bernoulli_, as stochastic depth calls it on [B, 1, ...]."""
        if isinstance(p, Tensor) or not input.dim() or not self.part.stop - self.part.start == len(input) == input.numel():
            return input.bernoulli_(p, **kwargs)
        if self._next == len(self._drawn):
            self._drawn.append(input.new_empty((self.samples, *input.shape[1:])).bernoulli_(p, **kwargs))
        self._next += 1
        return input.copy_(self._drawn[self._next - 1][self.part])


def parts(samples: int, size: int) -> Iterator[tuple[slice, Draws | None]]:
    """The pieces of a batch, with their random numbers where there are several."""
    draws = Draws(samples) if size < samples else None
    for start in range(0, samples, size):
        part = slice(start, min(start + size, samples))
        if draws:
            draws.begin(part)
        yield part, draws


def in_pieces(call: Call, x: Tensor, size: int) -> Tensor:
    """call(x), `size` samples at a time, without a graph."""
    out = None
    for part, draws in parts(len(x), size):
        out = written(out, call(x[part], draws=draws), part, len(x))
    return out


def written(whole: Tensor | None, piece: Tensor, part: slice, samples: int) -> Tensor:
    """`piece` as the samples `part` of `whole`, which is made, laid out like the piece, where it is None."""
    if whole is None:
        if len(piece) == samples:
            return piece
        shape, strides, step = (samples, *piece.shape[1:]), [0] * piece.dim(), 1
        for dim in reversed(memory_order(piece)):
            strides[dim], step = step, step * shape[dim]
        whole = piece.new_empty_strided(shape, strides)  # no view, which could not be changed in place
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
