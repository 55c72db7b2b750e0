"""Learns from one forward pass the order of a model's modules, its blocks, and how hidden states lie in tensors.

The pass runs on dataless tensors. Nothing here asks which family a model belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from s2a_cli.backbones.branches import is_norm
from s2a_cli.backbones.hidden import Hidden, grid_like, square
from s2a_cli.common.dataless import Dataless
from s2a_cli.memory.predict import dataless_tensors

Sample = tuple[Tensor, ...]  # what a model is called with for one sample: tensors without the dimension of the batch
BATCH = 2  # samples of the pass
COVERS = 0.5  # share of a module's parameters that the blocks within it must have to replace it
CHANNELS: dict[Callable, int] = {  # function -> the dimension in which its input has the channels
    **dict.fromkeys((F.linear, F.layer_norm, F.rms_norm, torch.layer_norm), -1),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d), 1),
    **dict.fromkeys((F.batch_norm, F.group_norm, torch.batch_norm, torch.group_norm), 1),
}
ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, torch.addcmul, torch.lerp}
JOINS = ADDS | {torch.cat, torch.concat}
ATTENDS = {F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax}


class LayoutError(ValueError):
    """Means that the layout of a hidden state can't be known; the message says of which."""


@dataclass(eq=False)
class ModuleTrace:
    """A record of a module that ran."""

    name: str
    module: nn.Module
    order: int  # its place in the order of execution
    calls: int = 0
    states: list[tuple[int, Tensor]] = field(default_factory=list)  # of _states, that it was called with
    input: Tensor | None = None  # the hidden state that it was called with, if there was one
    output: Tensor | None = None  # the hidden state that it returned, if there was one
    places: tuple[int, int] = (0, 0)  # indices of input and output among the tensors that it took and returned
    within: list[ModuleTrace] = field(default_factory=list)  # modules that ran directly within it, in order
    widths: set[int] = field(default_factory=set)  # numbers of channels of what layers within it read and return
    reads: int | None = None  # the dimension that a layer within it reads as the channels of `input`
    joined: set[int] = field(default_factory=set)  # numbers of elements of what it adds up or concatenates by itself
    attends: bool = False  # whether a softmax or fused attention runs within it

    @property
    def layers(self) -> int:
        """Returns how many weight matrices and kernels it has."""
        return sum(p.ndim > 1 for p in self.module.parameters())

    @property
    def size(self) -> int:
        """Returns how many parameters it has."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def normalises(self) -> bool:
        """Tells whether it is a normalisation layer."""
        return not self.within and is_norm(self.module)

    def descendants(self) -> Iterator[ModuleTrace]:
        """Yields the modules that ran within it, in order."""
        for inner in self.within:
            yield inner
            yield from inner.descendants()

    @property
    def maps(self) -> bool:
        """Tells whether it ran once and maps one hidden state to another."""
        return self.calls == 1 and self.input is not None and self.output is not None

    @property
    def is_residual(self) -> bool:
        """Tells whether its output is as large as something that it adds up or concatenates by itself."""
        return self.output is not None and self.output.numel() in self.joined


@dataclass
class Trace:
    """A record of a forward pass."""

    order: dict[str, int]  # name of a module -> its place in the order of execution; the root's is 0
    ran: list[ModuleTrace]  # modules that ran, in that order
    output: Any  # of the model


def images_of(size: int) -> tuple[Tensor]:
    """Returns what a model of square images takes for one sample: [3, size, size], without data."""
    return (torch.empty(3, size, size, device="meta"),)


def run_without_data(model: nn.Module, sample: Sample, watched: AbstractContextManager | None = None) -> Any:
    """Returns what the model returns in evaluation for BATCH samples, with nothing in any tensor.

    sample: what it takes for one; only shapes are read, and dtypes where they are not floating. watched: entered around
    the pass. Raises what the model raises where it can't take them.
    """
    parameter = next(model.parameters())
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        # in evaluation the fast path runs a whole nn.TransformerEncoderLayer as one operator
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.no_grad())
        if parameter.device.type != "meta":
            stack.enter_context(Dataless())
            stack.enter_context(dataless_tensors(model))
            parameter = next(model.parameters())
        stack.enter_context(watched or nullcontext())
        return model(*_inputs(parameter, sample))


def run_on_zeros(model: nn.Module, sample: Sample) -> Any:
    """Returns what the model returns in evaluation for BATCH samples like this one, of zeros.

    Raises what the model raises, also for dtypes that do not fit, which no pass without data tells.
    """
    with torch.no_grad(), _evaluating(model):
        return model(*(x.zero_() for x in _inputs(next(model.parameters()), sample)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation, and each of its modules back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _inputs(parameter: Tensor, sample: Sample) -> list[Tensor]:
    """Returns BATCH samples for the model of this parameter, on its device and of its dtype where they are floating."""
    dtypes = [parameter.dtype if x.is_floating_point() else x.dtype for x in sample]
    return [torch.empty(BATCH, *x.shape, device=parameter.device, dtype=d) for x, d in zip(sample, dtypes)]


def trace(model: nn.Module, sample: Sample) -> Trace:
    """Runs the model once on BATCH samples like this one. Raises what the model raises where it can't take them."""
    names = {module: name for name, module in model.named_modules()}
    ran: dict[nn.Module, ModuleTrace] = {}
    running: list[ModuleTrace] = []

    def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in ran:
            ran[module] = ModuleTrace(names[module], module, len(ran), states=_states((args, kwargs)))
            ran[module].input = next((x for _, x in ran[module].states), None)
            if running:
                running[-1].within.append(ran[module])
        ran[module].calls += 1
        running.append(ran[module])

    def ends(module: nn.Module, args: tuple, output: Any) -> None:
        found, returned = running.pop(), _states(output)
        if found.states and returned:
            pairs = zip(found.states, returned)
            changed = (pair for pair in pairs if all(pair[1][1] is not x for _, x in found.states))
            (place, found.input), (out, found.output) = next(changed, (found.states[0], returned[0]))
            found.places = place, out

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(ends).remove)
        output = run_without_data(model, sample, _Evidence(running))
    order = {found.name: found.order for found in ran.values()}
    for name in names.values():
        if name not in order:  # a module whose parent computes with its tensors takes the place of that parent
            order[name] = order.get(name.rpartition(".")[0], 0)
    return Trace(order, list(ran.values()), output)


def _states(values: Any) -> list[tuple[int, Tensor]]:
    """Returns (index among all tensors, tensor) of the tensors in `values` that may be hidden states."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return [(i, x) for i, x in enumerate(tensors) if x.ndim in (3, 4) and len(x) == BATCH and x.is_floating_point()]


class _Evidence(TorchFunctionMode):
    """Notes in the records of the modules that run what their layers read, and what they add up."""

    def __init__(self, running: list[ModuleTrace]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in CHANNELS and args and isinstance(args[0], Tensor):
            for found in self.running:
                found.widths |= {x.shape[CHANNELS[func]] for x in (args[0], out) if x.ndim > 1}
                if args[0] is found.input and found.reads is None:
                    found.reads = CHANNELS[func] % args[0].ndim
        elif func in JOINS and isinstance(out, Tensor) and self.running:
            if not any(isinstance(x, nn.Parameter) for x in args[:2]):  # as positions of tokens are: a bias, no branch
                self.running[-1].joined.add(out.numel())
        elif func in ATTENDS:
            for found in self.running:
                found.attends = True
        return out


def find_blocks(model: nn.Module, seen: Trace, given: Collection[nn.Module] = ()) -> list[ModuleTrace]:
    """Returns the repeated blocks of a model, each of which maps one hidden state to the next, in order; maybe none.

    given: the blocks, where they are known. Otherwise they are the blocks that timm counts for its layer decay. Where
    such a block is a sequence of finer ones, the finer ones are taken, down to modules that add something to their
    input. Where timm names none, they are found from the root down; where nothing adds to its input, they are the
    modules of one class with most of the parameters that run one after another.
    """
    if given:
        return [found for found in seen.ran if found.module in given and found.maps]
    root, patterns = seen.ran[0], _block_patterns(model)
    named = [r for r in seen.ran if r is not root and any(re.fullmatch(p.rstrip("$"), r.name) for p in patterns)]
    named = _without_shared_inputs([r for r in named if r.maps and r.layers], seen.ran)
    if not named:
        inner = [block for unit in _units(root) for block in _expanded(unit)]
        named = [block for block in inner if block.is_residual and block.input is not root.input] or _repeated(seen.ran)
    return sorted({block for found in named for block in _expanded(found)}, key=lambda block: block.order)


def _block_patterns(model: nn.Module) -> list[str]:
    """Returns timm's regular expressions for the names of the blocks that its layer decay counts one by one."""
    group_matcher = getattr(model, "group_matcher", None)
    matcher = group_matcher(coarse=False) if group_matcher else {}
    patterns = matcher.get("blocks", []) if isinstance(matcher, dict) else []
    if isinstance(patterns, str):
        return [patterns]
    return [pattern for pattern, fixed in patterns if fixed is None]


def _repeated(ran: list[ModuleTrace]) -> list[ModuleTrace]:
    """Returns the modules of one class, with modules within, that run beside each other; maybe none.

    Of several such groups it is the one with most parameters.
    """
    groups: dict[tuple[ModuleTrace, type], list[ModuleTrace]] = {}
    for parent in ran:
        for found in parent.within:
            if found.maps and found.layers and found.within:
                groups.setdefault((parent, type(found.module)), []).append(found)
    repeated = (group for group in groups.values() if len({id(found.input) for found in group}) == len(group) > 1)
    return max(repeated, key=lambda group: sum(found.size for found in group), default=[])


def _without_shared_inputs(blocks: list[ModuleTrace], ran: list[ModuleTrace]) -> list[ModuleTrace]:
    """Replaces blocks side by side, which read the same tensor, by the modules that they lie in."""
    readers = [sum(other.input is block.input for other in blocks) for block in blocks]
    parents = {child: parent for parent in ran for child in parent.within}
    found = [parents[block] if count > 1 else block for block, count in zip(blocks, readers)]
    return [block for block in dict.fromkeys(found) if block.maps and block is not ran[0]]


def _units(parent: ModuleTrace) -> list[ModuleTrace]:
    """Returns the modules within that may be blocks: of several layers, and alone in reading their input."""
    units = [r for r in parent.within if r.maps and r.layers > 1]
    return [r for r in units if sum(other.input is r.input for other in units) == 1]


def _expanded(block: ModuleTrace) -> list[ModuleTrace]:
    """Returns the residual modules within a block where they have most of its parameters, else the block itself.

    A residual block is never expanded.
    """
    inner = [] if block.is_residual else [b for unit in _units(block) for b in _expanded(unit) if b.is_residual]
    return inner if inner and sum(b.size for b in inner) >= COVERS * block.size else [block]


def layouts(
    blocks: list[ModuleTrace], seen: Trace, prefix: int, image: tuple[int, int] = (1, 1)
) -> list[tuple[Hidden, Hidden]]:
    """Returns the hidden states at the input and at the output of each block.

    prefix: the number of class and register tokens, which not every block may have. image: height and width in pixels.
    Raises LayoutError where a layout can't be known.
    """
    read = {id(r.input): r.reads for r in seen.ran if r.input is not None and r.reads is not None}
    found: list[tuple[Hidden, Hidden]] = []
    before: tuple[torch.Size, int] | None = None
    for block in blocks:
        pair = []
        for x, place in zip((block.input, block.output), block.places):
            assert x is not None, "find_blocks takes modules that map one hidden state to another"
            dim = _channel_dim(x, read, block, before)
            pair.append(_hidden(x, dim, prefix, place, image))
            before = x.shape, dim
        found.append((pair[0], pair[1]))
    return found


def _channel_dim(x: Tensor, read: dict[int, int], block: ModuleTrace, before: tuple[torch.Size, int] | None) -> int:
    """Returns the dimension in which x has the channels. Raises LayoutError.

    It is the first known of these: the one that a layer reads as channels; the one with as many channels as layers of
    the block have; the one beside a square map, as maps of square images are; the one of the state before.
    """
    if id(x) in read:
        return read[id(x)]
    fits = [dim for dim in (1, x.ndim - 1) if x.shape[dim] in block.widths]
    beside_square = [dim for dim in (1, 3) if x.ndim == 4 and x.shape[2] == x.shape[4 - dim]]
    for found in (fits, beside_square):
        if len(found) == 1:
            return found[0]
    if before and len(before[0]) == x.ndim and before[1] in (fits or (1, x.ndim - 1)):
        return before[1]
    raise LayoutError(f"the layout of {list(x.shape[1:])} at {block.name} can't be told from its layers")


def _hidden(x: Tensor, dim: int, prefix: int, place: int, image: tuple[int, int]) -> Hidden:
    """Describes a hidden state that has its channels in dimension `dim`."""
    shape = tuple(x.shape[1:])
    if dim == 1:
        return Hidden("channels_first", shape, place=place, image=image)
    if x.ndim == 4:
        return Hidden("channels_last", shape, place=place, image=image)
    return Hidden("tokens", shape, _prefix(shape[0], prefix, image), place, image)


def _prefix(tokens: int, stated: int, image: tuple[int, int]) -> int:
    """Returns how many of the tokens are class or register tokens: as many as leave a map of the image, or a square.

    First those stated, which it also returns where none do.
    """
    counts = [count for count in (stated, 0, 1) if count < tokens]
    maps = [count for count in counts if grid_like(image, tokens - count)]
    squares = [count for count in counts if square(tokens - count)]
    return next(iter([*maps, *squares]), min(stated, tokens - 1))
