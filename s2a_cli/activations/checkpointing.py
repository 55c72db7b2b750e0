"""Blocks run in pieces of the batch, and with recompute=block keep only their input and run again in the backward pass.

A block maps one hidden state [B, ...] to another, sample by sample. Then running B / chunks samples at a time gives the
same result, and all of the block's temporaries shrink by `chunks`: in the forward pass, in what is computed again, and
in the backward pass. What a recomputed block keeps is its input: exact (gradient checkpointing, arXiv 1604.06174), in
bfloat16, or in b bits; everything inside is then derived from it, the block's own codes included.

Random numbers are the same when a block is computed again. Against a batch in one piece, stochastic depth drops the
same samples; an elementwise dropout in pieces has other draws of the same distribution.

Bytes kept by a recomputed block of input [B, ..., C]: grouped_size(B * ..., C, group, input bits), see codes.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from s2a_cli.activations.ops.registry import handlers_of
from s2a_cli.activations.piece_sizes import MOST, piece_sizes
from s2a_cli.activations.random_numbers import Draws, parts, random_state, set_random_state
from s2a_cli.activations.recompute import Recompute, Replay, in_pieces, input_bytes, splits
from s2a_cli.activations.torch_checkpoint import refuse_checkpointing
from s2a_cli.config.schema import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.mode import ActivationMode


TENSOR = object()  # stands for one among what a block returns
_patching = threading.Lock()


def runners_of(mode: ActivationMode, blocks: Iterable[nn.Module]) -> list[BlockRunner]:
    """One for each block. Raises ValueError for a block that is listed twice with different settings."""
    found: dict[nn.Module, BlockRunner] = {}
    for index, block in enumerate(blocks):
        config = mode.config.of_block(index)
        known = found.setdefault(block, BlockRunner(mode, index, block, config))
        if known.config != config:
            raise ValueError(f"blocks {known.index} and {index} are one module: they can't have different settings")
    coded = [r for r in found.values() if r.config.recompute == "none" and r.config.chunks is None]
    return [*found.values(), *(MlpRunner(mode, r.index, mlp, r.config) for r in coded for mlp in mlps(r.module))]


def mlps(block: nn.Module) -> list[nn.Module]:
    """The multi-layer perceptrons within a block, as timm builds them, whose hidden layer is its largest tensor."""
    return [m for m in block.modules() if m is not block and hasattr(m, "fc1") and hasattr(m, "fc2")]


class BlockRunner:
    """Stands in for the forward of block number `index` in the threads that are within the mode."""

    def __init__(self, mode: ActivationMode, index: int, module: nn.Module, config: QuantConfig):
        self.mode, self.index, self.module = mode, index, module
        self.config, self.handlers = config, handlers_of(config)  # those of this block
        self.has_mlp = bool(mlps(module))
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
        call = Call(self, args, kwargs, self.mode.sites.entry(f"block {self.index}"))
        inputs, states = call.inputs, call.inputs[: call.states]
        call.inputs = []  # a call that is to be made again must not keep them

        def as_it_is() -> Any:
            with self.mode.inside(self, call.name):
                return self.inner(*args, **kwargs)

        if not inputs or not len(inputs[0]):
            return as_it_is()
        samples, config = len(inputs[0]), self.config
        size = self.piece_size(call, inputs[0], "block" if config.recompute == "none" else "recomputed")
        if not torch.is_grad_enabled():
            outputs = in_pieces(call, inputs, size) if size < samples else None
            return as_it_is() if outputs is None else call.returned(outputs)
        if config.recompute == "none" and size >= samples and (config.chunks or self.has_mlp):
            return as_it_is()
        probe = self._probe(call, inputs)
        if probe.changes_input or not probe.splits:
            return as_it_is()
        codes = "wide" if probe.is_wide and not self.has_mlp else "block"
        if not probe.trained and not any(x.requires_grad for x in inputs):
            size = self.piece_size(call, inputs[0], codes if config.recompute == "none" else "forward")
            with torch.no_grad():
                outputs = in_pieces(call, inputs, size)
                return as_it_is() if outputs is None else call.returned(outputs)
        if config.recompute == "none" or probe.kept <= sum(input_bytes(x[:1], config) for x in states):
            size = self.piece_size(call, inputs[0], codes)
            if size >= samples:
                return as_it_is()
            # Split at once: the gradients of slices would each be as large as the whole.
            pieces = zip(parts(samples, size), zip(*(x.split(size) for x in inputs)))
            made = [call(list(piece), draws=draws) for (_, draws), piece in pieces]
            return call.returned([torch.cat(outputs) for outputs in zip(*made)])
        replay = Replay(call, inputs[0].device, probe.unread)
        return call.returned(list(Recompute.apply(replay, size, len(inputs), *inputs, *probe.trained)))

    def piece_size(self, call: Call, x: Tensor, kind: str) -> int:
        """Samples in a piece of the batch x.

        kind: the piece size that holds where the number of pieces is left to us.
        """
        if call.is_whole:
            return len(x)
        pieces = self.config.chunks or min(MOST, x.numel() // getattr(piece_sizes(x.device), kind))
        return -(-len(x) // max(pieces, 1))

    def _probe(self, call: Call, inputs: list[Tensor]) -> Probe:
        x = inputs[0]
        described = tuple((t.requires_grad, t.dtype, t.shape[1:]) for t in inputs)
        key = described, call.is_whole, self.module.training, torch.is_autocast_enabled(x.device.type)
        if key not in self._probes or not self._probes[key].holds():
            state, linears = random_state(x.device), self.mode.thread.linears
            self._probes[key] = probe(call, inputs if call.is_whole else [t[:1] for t in inputs])
            set_random_state(x.device, state)
            self.mode.thread.linears = linears
        return self._probes[key]


class MlpRunner(BlockRunner):
    """Stands in for the forward of a multi-layer perceptron of a block that keeps codes: its hidden layer never exists
    whole.
    """

    def piece_size(self, call: Call, x: Tensor, kind: str) -> int:
        return super().piece_size(call, x, "mlp")


class Call:
    """One call of a block, which can be made again with other tensors in the place of its inputs.

    inputs: the first tensor of floats among the arguments, which is split by sample, and all others that need a
    gradient. states: how many of them, the first ones, are split by sample. is_whole: whether the batch must stay in
    one piece, because other tensors may hold a part for each sample.
    """

    def __init__(self, block: BlockRunner, args: tuple, kwargs: dict, name: str):
        self.block, self.name, self.inner = block, name, block.inner
        given, self._spec = tree_flatten((args, kwargs))
        tensors = list({id(x): x for x in given if isinstance(x, Tensor) and x.dim()}.values())
        first = next((x for x in tensors if x.is_floating_point()), None)
        split = [x for x in tensors if x is first or (first is not None and x.requires_grad and len(x) == len(first))]
        split.sort(key=lambda x: x is not first)
        others = [x for x in tensors if first is not None and not any(x is state for state in split)]
        self.inputs = [*split, *(x for x in others if x.requires_grad)]
        self.states = len(split)
        self.is_whole = any(x.requires_grad or (len(x) > 1 and len(first) % len(x) == 0) for x in others)
        numbers = {id(x): number for number, x in enumerate(self.inputs)}
        self._places = {i: numbers[id(x)] for i, x in enumerate(given) if id(x) in numbers}
        self._given = [None if i in self._places else x for i, x in enumerate(given)]
        self._beside: tuple[list, Any] | None = None  # what the block returns beside its tensors, and the structure

    def __call__(self, inputs: list[Tensor], unread: int = 0, draws: Draws | None = None) -> list[Tensor]:
        """The tensors that the block returns for these inputs."""
        given = [inputs[self._places[i]] if i in self._places else x for i, x in enumerate(self._given)]
        args, kwargs = tree_unflatten(given, self._spec)
        with self.block.mode.inside(self.block, self.name, unread, draws):
            found, structure = tree_flatten(self.inner(*args, **kwargs))
        self._beside = [TENSOR if isinstance(y, Tensor) else y for y in found], structure
        return [y for y in found if isinstance(y, Tensor)]

    def returned(self, outputs: list[Tensor]) -> Any:
        """What the block returns with these tensors in it."""
        beside, structure = self._beside
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if y is TENSOR else y for y in beside], structure)


@dataclass(frozen=True)
class Probe:
    """What the graph of a sample shows of a block."""

    trained: list[Tensor]  # the trained tensors that its output depends on, wherever they live
    kept: float  # bytes for the backward pass, of one sample
    unread: (
        int  # which of its linear layers is the last and has an output that nothing in backward reads: 1, 2, ...; or 0
    )
    changes_input: bool  # in place
    splits: bool  # whether what it returns is split by sample as its inputs are
    is_wide: bool  # whether a tensor within has more than twice the elements of its input and of its output
    flags: list[tuple[Tensor, bool]]  # the parameters that it read, and whether they were trained

    def holds(self) -> bool:
        """Whether the same parameters are trained as when it was made."""
        return all(parameter.requires_grad == flag for parameter, flag in self.flags)


class Reads(TorchFunctionMode):
    """Collects the parameters that functions are called with, and the elements of the largest tensor that one
    returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.widest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, nn.Parameter):
                self.found[id(x)] = x
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.widest = max(self.widest, out.numel())
        return out


def probe(call: Call, inputs: list[Tensor]) -> Probe:
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

    starts, reads = [x.detach().requires_grad_(x.requires_grad) for x in inputs], Reads()
    with mode.calibration.paused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), reads:
        samples = [start.clone() for start in starts]
        versions = [sample._version for sample in samples]
        outputs = call(samples)
    reads.found.update((id(p), p) for p in module.parameters())
    return Probe(
        trained=[tensor for tensor in leaves(outputs) if not any(tensor is start for start in starts)],
        kept=sum(kept.values()) / len(inputs[0]),
        unread=thread.linears - begun if last < thread.linears else 0,
        changes_input=versions != [sample._version for sample in samples],
        splits=splits(outputs, None if call.is_whole else len(samples[0])),
        is_wide=reads.widest > 2 * max(x.numel() for x in (*samples, *outputs)),
        flags=[(p, p.requires_grad) for p in reads.found.values()],
    )


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without a history whose gradients a backward pass from these would find, in a fixed order."""
    found, seen, todo = [], set(), [y.grad_fn for y in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(function for function, _ in node.next_functions)
    return found
