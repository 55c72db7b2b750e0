"""Runs blocks in chunks of the batch; with recompute=block keeps only their input and runs them again in backward.

A block maps one hidden state [B, ...] to another, sample by sample. Then running B / chunks samples at a time gives the
same result, and all of the block's temporaries shrink by `chunks`: in the forward pass, in what is computed again, and
in the backward pass. What a recomputed block keeps is its input: exact (gradient checkpointing, arXiv 1604.06174), in
bfloat16, or in b bits; everything inside is then derived from it, the block's own codes included.

Random numbers are the same when a block is computed again. Against a batch in one chunk, stochastic depth drops the
same samples; an elementwise dropout in several chunks has other draws of the same distribution.

A recomputed block of input [B, ..., C] keeps groupwise_size(B * ..., C, group, input bits) bytes, see quant/packing.py.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from s2a_cli.activations.chunk_sizes import MOST_CHUNKS, chunk_sizes
from s2a_cli.activations.ops.registry import handlers_of
from s2a_cli.activations.probe import Probe, mlps, probe
from s2a_cli.activations.random_numbers import SampleDraws, batch_chunks, random_state, set_random_state
from s2a_cli.activations.recompute import Recomputation, Recompute, in_batch_chunks, input_bytes
from s2a_cli.activations.torch_checkpoint import refuse_checkpointing
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import may_read_input
from s2a_cli.common.norms import is_batch_norm
from s2a_cli.config.schema import QuantConfig

if TYPE_CHECKING:
    from s2a_cli.activations.mode import ActivationMode


TENSOR = object()  # stands for one among what a block returns
Change = Callable[[tuple, dict], tuple[tuple, dict]]  # of a block's arguments
MOST_PROBES = 64  # that are kept of a block
MANY_CHUNKS = 8  # least for which changed inputs of recomputed blocks are made by chunk: ViT-B, -28 MiB in 8, +9 in 4
_patching = threading.Lock()


def checkpointed_blocks(mode: ActivationMode, blocks: Iterable[nn.Module]) -> list[CheckpointedBlock]:
    """Returns one for each block, and one for each MLP within those that keep codes and are not split themselves.

    Raises ValueError for a block that is listed twice with different settings.
    """
    found: dict[nn.Module, CheckpointedBlock] = {}
    for index, module in enumerate(blocks):
        config = mode.config.of_block(index)
        known = found.setdefault(module, CheckpointedBlock(mode, index, module, config))
        if known.config != config:
            raise ValueError(f"blocks {known.index} and {index} are one module: they can't have different settings")
    split: dict[nn.Module, CheckpointedBlock] = {}  # the innermost block of each MLP
    for block in found.values():
        if block.config.recompute == "none" and block.config.chunks is None:
            for mlp in mlps(block.module):
                if mlp not in split or block.module in split[mlp].module.modules():
                    split[mlp] = block
    inner = (ChunkedMlp(mode, b.index, mlp, b.config) for mlp, b in split.items() if mlp not in found)
    return [*found.values(), *inner]


class StandIn:
    """Takes the place of a module's forward while a memory is active in any thread, and afterwards calls through.

    PyTorch has no hook around a forward, so `module.forward` is replaced. Someone else may have replaced it before:
    theirs is called, and comes back. Someone may replace it meanwhile, with a function that calls this one: theirs
    stays, and as this object calls through from then on, the next stand-in can call theirs.
    """

    def __init__(self, block: CheckpointedBlock):
        self.block: CheckpointedBlock | None = block  # None: it calls through
        found = block.module.__dict__.get("forward")
        if isinstance(found, StandIn):
            if found.block is not None:
                raise RuntimeError(
                    f"block {block.index} is within another compress_activations(...), in another thread"
                )
            self.own, self.inner = found.own, found.inner  # someone put back what stood here in an earlier step
        else:
            self.own: Callable | None = found  # the instance's forward; None: it has its class's
            self.inner: Callable = block.module.forward
        block.module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.block is None:
            return self.inner(*args, **kwargs)
        waiting: Waiting | None = self.block.waiting.__dict__.pop("call", None)
        change = waiting.change if waiting and waiting.is_of(args, kwargs) else None
        return self.block.run(self.inner, args, kwargs, change)

    def retire(self, module: nn.Module) -> None:
        """Puts back what was there, unless someone has replaced the forward since."""
        self.block = None
        if module.__dict__.get("forward") is not self:
            return
        if self.own is None:
            del module.forward
        else:
            module.forward = self.own

    def __deepcopy__(self, memo: dict) -> Any:
        if self.block is not None:
            raise RuntimeError("a model can't be copied within compress_activations(...): copy it before or after")
        return copy.deepcopy(self.inner, memo)


@dataclass
class Waiting:
    """Holds the arguments of a call that its pre-hooks have seen, and how they are to be changed within the block."""

    args: tuple
    kwargs: dict
    change: Change

    def is_of(self, args: tuple, kwargs: dict) -> bool:
        """Tells whether these are the same arguments; those of a call that was broken off are others."""
        same = len(args) == len(self.args) and kwargs.keys() == self.kwargs.keys()
        return same and all(map(operator.is_, (*args, *kwargs.values()), (*self.args, *self.kwargs.values())))


def change_within(block: nn.Module, hook: Callable, args: tuple, kwargs: dict, change: Change) -> bool:
    """Has the arguments of a block's call changed where its chunks of the batch run: the change exists for one chunk.

    Call it in `hook`, a forward pre-hook of the block. The change must be made sample by sample, by a method of the
    module whose parameters it uses. Returns False, and does nothing, where no memory of this thread runs the block,
    where that would not save memory, and where another hook may read the change: a pre-hook behind this one, a
    backward hook, or a forward hook, which is given the inputs as well, unless `reads_output_only` says that it
    does not look at them.
    """
    stand_in = block.__dict__.get("forward")
    inner = stand_in.block if isinstance(stand_in, StandIn) else None
    if inner is None or inner.mode.frame is None or not inner.saves_by_changes_within:
        return False
    hooks = list(block._forward_pre_hooks.values())
    if hooks[-1:] != [hook] or hooks.count(hook) > 1 or _others_read_inputs(block):
        return False
    inner.waiting.call = Waiting(args, kwargs, change)
    return True


def _others_read_inputs(block: nn.Module) -> bool:
    """Returns whether hooks that run after the forward, or the gradients of inputs, may be somebody's."""
    hooks = (*block._forward_hooks.values(), *torch.nn.modules.module._global_forward_hooks.values())
    return bool(block._backward_hooks or block._backward_pre_hooks) or any(map(may_read_input, hooks))


class _Parts(threading.local):
    depth = 0


_parts = _Parts()


@contextmanager
def _in_parts() -> Iterator[None]:
    _parts.depth += 1
    try:
        yield
    finally:
        _parts.depth -= 1


def runs_in_parts() -> bool:
    """Tells whether this thread is within a block that may run some images at a time, and again."""
    return _parts.depth > 0


class CheckpointedBlock:
    """Runs block number `index` in chunks of the batch, and again in the backward pass, as its settings say."""

    def __init__(self, mode: ActivationMode, index: int, module: nn.Module, config: QuantConfig):
        self.mode, self.index, self.module = mode, index, module
        self.config, self.handlers = config, handlers_of(config)  # those of this block
        self.has_mlp = bool(mlps(module))
        divided = config.recompute == "block" or config.chunks != 1
        self._norms = [m for m in module.modules() if is_batch_norm(m)] if divided else []
        self.waiting = threading.local()  # .call: a Waiting, for the call that comes next in this thread
        self._probes: dict[tuple, Probe] = {}
        self._probed: tuple[int, ...] = ()  # the ids of the parameters that they are about, which they keep alive
        self._users = 0  # threads that are within the mode
        self._stand_in: StandIn | None = None

    @property
    def saves_by_changes_within(self) -> bool:
        """Returns whether a change of the inputs takes less memory in each chunk than for the whole batch.

        It does where there are chunks for certain. Where a block is computed again, a chunk of its input and the
        changed one exist beside each other: that pays in many chunks, and where not the exact input is kept.
        """
        chunks = self.config.chunks or 1
        if self.config.recompute == "block":
            return chunks >= MANY_CHUNKS and self.config.input is not None
        return chunks > 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces the module's forward, then puts back what was there: the class's, or one of the instance's own.

        Raises RuntimeError for a block that another memory has replaced, in another thread.
        """
        with _patching:
            if self._stand_in is None:
                self._stand_in = StandIn(self)
            self._users += 1
        try:
            yield
        finally:
            with _patching:
                self._users -= 1
                if not self._users:
                    self._stand_in.retire(self.module)
                    self._stand_in = None

    def run(self, inner: Callable, args: tuple, kwargs: dict, change: Change | None = None) -> Any:
        """Returns inner(*args, **kwargs), which is what the module's forward was, of changed arguments."""

        def changed(*args: Any, **kwargs: Any) -> Any:
            if change:
                args, kwargs = change(args, kwargs)
            return inner(*args, **kwargs)

        frame = self.mode.frame
        if frame is None:  # in a thread of its own
            return changed(*args, **kwargs)
        refuse_checkpointing(frame.grad)
        if any(norm.training for norm in self._norms):
            raise UserError(
                f"block {self.index} ({type(self.module).__name__}) has BatchNorms in training mode, whose statistics"
                " recompute='block' and chunks change: put them into eval(), or set recompute='none' and chunks=1"
            )
        call = Call(self, changed, args, kwargs, self.mode.sites.entry(f"block {self.index}"), change)
        inputs = call.inputs
        call.inputs = []  # a call that is to be made again must not keep them
        outputs = None
        if inputs and len(inputs[0]):
            with _in_parts():
                graph = torch.is_grad_enabled()
                outputs = self._with_graph(call, inputs) if graph else self._without_graph(call, inputs)
        if outputs is not None:
            return call.returned(outputs)
        with self.mode.inside(self, call.name):
            return changed(*args, **kwargs)

    def _without_graph(self, call: Call, inputs: list[Tensor]) -> list[Tensor] | None:
        """Returns the outputs, made in batch chunks; None where the batch is to run whole."""
        size = self.chunk_size(call, inputs[0], "block" if self.config.recompute == "none" else "recomputed")
        return in_batch_chunks(call, inputs, size) if size < len(inputs[0]) else None

    def _with_graph(self, call: Call, inputs: list[Tensor]) -> list[Tensor] | None:
        """Returns the outputs, made in batch chunks or to be recomputed; None where the block is to run as it is."""
        x, samples, config = inputs[0], len(inputs[0]), self.config
        recomputes = config.recompute == "block"
        if not recomputes and (config.chunks or self.has_mlp) and self.chunk_size(call, x, "block") >= samples:
            return None
        found = self._probe(call, inputs)
        if found.changes_input or not found.splits:
            return None
        kind = "wide" if found.is_wide and not self.has_mlp else "block"
        if not found.trained and not any(x.requires_grad for x in inputs):
            with torch.no_grad():
                return in_batch_chunks(call, inputs, self.chunk_size(call, x, "forward" if recomputes else kind))
        if recomputes and found.kept > sum(input_bytes(x[:1], config) for x in inputs[: call.states]):
            if found.shares:
                raise UserError(
                    f"block {self.index} ({type(self.module).__name__}) reads a tensor that other operators made"
                    " outside of it and that needs a gradient: hand it over as an argument of the block, or set"
                    " recompute='none'"
                )
            recomputation, size = Recomputation(call, x.device, found.unread), self.chunk_size(call, x, "recomputed")
            return list(Recompute.apply(recomputation, size, len(inputs), *inputs, *found.trained))
        size = self.chunk_size(call, x, kind)
        if size >= samples:
            return None
        # Split at once: the gradients of views would each be as large as the whole.
        chunks = zip(batch_chunks(samples, size), zip(*(x.split(size) for x in inputs)))
        made = [call(list(chunk), draws=draws) for (_, draws), chunk in chunks]
        return [torch.cat(outputs) for outputs in zip(*made)]

    def chunk_size(self, call: Call, x: Tensor, kind: str) -> int:
        """Returns how many samples of the batch x run at a time.

        kind: the field of ChunkSizes that holds where the number of chunks is left to us.
        """
        if call.is_whole:
            return len(x)
        chunks = self.config.chunks or min(MOST_CHUNKS, x.numel() // getattr(chunk_sizes(x.device), kind))
        return -(-len(x) // max(chunks, 1))

    def _probe(self, call: Call, inputs: list[Tensor]) -> Probe:
        x = inputs[0]
        described = tuple((t.requires_grad, t.dtype, t.shape[1:]) for t in inputs)
        owners = (self.module, getattr(call.change, "__self__", None))
        parameters = tuple(id(p) for owner in owners if isinstance(owner, nn.Module) for p in owner.parameters())
        if parameters != self._probed:  # some were replaced by others
            self._probes.clear()
            self._probed = parameters
        autocast = torch.is_autocast_enabled(x.device.type)
        key = described, call.is_whole, call.change, call.beside, self.module.training, autocast
        if len(self._probes) >= MOST_PROBES:  # such as of a number that counts steps
            self._probes.clear()
        if key not in self._probes or not self._probes[key].holds():
            state = random_state(x.device)
            self._probes[key] = probe(call, inputs if call.is_whole else [t[:1] for t in inputs])
            set_random_state(x.device, state)
        return self._probes[key]


class ChunkedMlp(CheckpointedBlock):
    """Runs a multi-layer perceptron of a block that keeps codes, so that its hidden layer never exists whole."""

    def chunk_size(self, call: Call, x: Tensor, kind: str) -> int:
        return super().chunk_size(call, x, "mlp")


class Call:
    """Makes one call of a block, and can make it again with other tensors in the place of its inputs.

    inputs: the first tensor of floats among the arguments, which is split by sample, and all others that need a
    gradient. states: how many of them, the first ones, are split by sample: those with as many samples and dimensions.
    is_whole: whether the batch must stay whole, because other tensors may hold something for each sample. change: of
    the arguments, which `inner` makes.
    """

    def __init__(
        self,
        block: CheckpointedBlock,
        inner: Callable,
        args: tuple,
        kwargs: dict,
        name: str,
        change: Change | None = None,
    ):
        self.block, self.name, self.inner, self.change = block, name, inner, change
        given, self._spec = tree_flatten((args, kwargs))
        tensors = list({id(x): x for x in given if isinstance(x, Tensor) and x.dim()}.values())
        first = next((x for x in tensors if x.is_floating_point()), None)
        split = [x for x in tensors if x is first or (first is not None and x.requires_grad and _is_alike(x, first))]
        split.sort(key=lambda x: x is not first)
        others = [x for x in tensors if first is not None and not any(x is state for state in split)]
        self.inputs = [*split, *(x for x in others if x.requires_grad)]
        self.states = len(split)
        samples = 0 if first is None else len(first)
        self.is_whole = any(x.requires_grad or _is_of_samples(x, samples) for x in others)
        numbers = {id(x): number for number, x in enumerate(self.inputs)}
        self._places = {i: numbers[id(x)] for i, x in enumerate(given) if id(x) in numbers}
        self._given = [None if i in self._places else x for i, x in enumerate(given)]
        # What beside tensors says how the block is called.
        flags = (x if isinstance(x, (int, str)) else type(x) for x in self._given)
        self.beside = len(args), tuple(kwargs), tuple((type(x), x) for x in flags)
        self._beside: tuple[list, Any] | None = None  # what the block returns beside its tensors, and the structure

    def __call__(self, inputs: list[Tensor], unread: int = 0, draws: SampleDraws | None = None) -> list[Tensor]:
        """Returns the tensors that the block returns for these inputs."""
        given = [inputs[self._places[i]] if i in self._places else x for i, x in enumerate(self._given)]
        args, kwargs = tree_unflatten(given, self._spec)
        with self.block.mode.inside(self.block, self.name, unread, draws):
            found, structure = tree_flatten(self.inner(*args, **kwargs))
        self._beside = [TENSOR if isinstance(y, Tensor) else y for y in found], structure
        return [y for y in found if isinstance(y, Tensor)]

    def returned(self, outputs: list[Tensor]) -> Any:
        """Returns what the block returns, with these tensors in it."""
        assert self._beside is not None, "the block has run"
        beside, structure = self._beside
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if y is TENSOR else y for y in beside], structure)


def _is_of_samples(x: Tensor, samples: int) -> bool:
    """Returns whether a tensor may hold something for each sample, or its heads, as masks [B H, L, L] do."""
    return len(x) > 1 and (samples % len(x) == 0 or (x.dim() > 2 and len(x) % samples == 0))


def _is_alike(x: Tensor, state: Tensor) -> bool:
    """Returns whether a tensor can be a hidden state of the same samples: [64, C] beside [64, N, C] is of positions."""
    return len(x) == len(state) and x.dim() == state.dim()
