"""What one forward pass shows of a model: the order of its modules, its blocks, and how hidden states lie in tensors.

The pass runs on tensors without data. Nothing here asks which family a model belongs to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from s2a_cli.backbones.hidden import Hidden
from s2a_cli.common.dataless import Hollow
from s2a_cli.memory.predict import hollow_tensors

BATCH = 2  # images of the pass
COVERS = 0.5  # of a module's parameters that the blocks within it must have to stand for it
CHANNELS: dict[Callable, int] = {  # functions that tell which dimension of what they read has the channels
    **dict.fromkeys((F.linear, F.layer_norm, F.rms_norm, torch.layer_norm), -1),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d), 1),
    **dict.fromkeys((F.batch_norm, F.group_norm, torch.batch_norm, torch.group_norm), 1),
}
JOINS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__iadd__,
    torch.cat,
    torch.concat,
    torch.addcmul,
    torch.lerp,
}


class LayoutError(ValueError):
    """A hidden state whose layout can't be known; the message says which."""


@dataclass(eq=False)
class Ran:
    """What was seen of a module that ran."""

    name: str
    module: nn.Module
    order: int
    calls: int = 0
    states: list[tuple[int, Tensor]] = field(default_factory=list)  # what it was called with, see _states
    given: Tensor | None = None  # the hidden state that it was called with, if there was one
    made: Tensor | None = None  # and that it returned
    places: tuple[int, int] = (0, 0)  # where they are among the tensors that it was called with, and returned
    within: list[Ran] = field(default_factory=list)  # modules that ran directly within it, in order
    widths: set[int] = field(default_factory=set)  # numbers of channels of what layers within it read and return
    reads: int | None = None  # the dimension that a layer within it reads as the channels of `given`
    joined: set[int] = field(default_factory=set)  # numbers of elements of what it adds up or concatenates by itself

    @property
    def layers(self) -> int:
        """How many weight matrices and kernels it has."""
        return sum(p.ndim > 1 for p in self.module.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def maps(self) -> bool:
        """Whether it maps one hidden state to another, once."""
        return self.calls == 1 and self.given is not None and self.made is not None

    @property
    def is_residual(self) -> bool:
        return self.made is not None and self.made.numel() in self.joined


@dataclass
class Trace:
    order: dict[str, int]  # of each module, by name, its place in the order of execution; the root's is 0
    ran: list[Ran]  # modules that ran, in that order
    output: Any


def trace(model: nn.Module, image_size: int) -> Trace:
    """Runs the model on images of this size. Raises what the model raises where it can't take them."""
    names = {module: name for name, module in model.named_modules()}
    ran: dict[nn.Module, Ran] = {}
    running: list[Ran] = []

    def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in ran:
            ran[module] = Ran(names[module], module, len(ran), states=_states((args, kwargs)))
            ran[module].given = next((x for _, x in ran[module].states), None)
            if running:
                running[-1].within.append(ran[module])
        ran[module].calls += 1
        running.append(ran[module])

    def ends(module: nn.Module, args: tuple, output: Any) -> None:
        found, made = running.pop(), _states(output)
        if found.states and made:
            changed = (pair for pair in zip(found.states, made) if all(pair[1][1] is not x for _, x in found.states))
            (place, found.given), (out, found.made) = next(changed, (found.states[0], made[0]))
            found.places = place, out

    training, parameter = model.training, next(model.parameters())
    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(ends).remove)
        stack.callback(model.train, training)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # a whole nn.TransformerEncoderLayer as one operator, in evaluation
        stack.enter_context(torch.no_grad())
        if parameter.device.type != "meta":
            stack.enter_context(Hollow())
            stack.enter_context(hollow_tensors(model))
            parameter = next(model.parameters())
        stack.enter_context(_Evidence(running))
        images = torch.empty(BATCH, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
        output = model.eval()(images)
    order = {found.name: found.order for found in ran.values()}
    for (
        name
    ) in names.values():  # a module that runs only through a parent's own arithmetic takes the place of that parent
        if name not in order:
            order[name] = order.get(name.rpartition(".")[0], 0)
    return Trace(order, list(ran.values()), output)


def _states(values: Any) -> list[tuple[int, Tensor]]:
    """The tensors that may be hidden states, with their places among all tensors."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return [(i, x) for i, x in enumerate(tensors) if x.ndim in (3, 4) and len(x) == BATCH and x.is_floating_point()]


class _Evidence(TorchFunctionMode):
    """Notes what layers read, and what is added up, in the modules that run."""

    def __init__(self, running: list[Ran]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in CHANNELS and args and isinstance(args[0], Tensor):
            for found in self.running:
                found.widths |= {x.shape[CHANNELS[func]] for x in (args[0], out) if x.ndim > 1}
                if args[0] is found.given and found.reads is None:
                    found.reads = CHANNELS[func] % args[0].ndim
        elif func in JOINS and isinstance(out, Tensor) and self.running:
            self.running[-1].joined.add(out.numel())
        return out


def find_blocks(model: nn.Module, seen: Trace) -> list[Ran]:
    """The repeated parts of a model that map one hidden state to the next, in order; none where there are no such
    parts.

    They are those that timm counts for its layer decay, and where these are sequences of finer ones, the finer ones:
    down to modules that add something to their input. Without timm's word they are found from the root down.
    """
    root, patterns = seen.ran[0], _block_patterns(model)
    named = [r for r in seen.ran if r is not root and any(re.fullmatch(p.rstrip("$"), r.name) for p in patterns)]
    named = _without_shared_inputs([r for r in named if r.maps and r.layers], seen.ran)
    if not named:
        inner = [block for unit in _units(root) for block in _expanded(unit)]
        named = [block for block in inner if block.is_residual and block.given is not root.given]
    return sorted({block for found in named for block in _expanded(found)}, key=lambda block: block.order)


def _block_patterns(model: nn.Module) -> list[str]:
    """timm's regular expressions for the names of a model's blocks (those that its layer decay counts one by one)."""
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    patterns = matcher.get("blocks", []) if isinstance(matcher, dict) else []
    if isinstance(patterns, str):
        return [patterns]
    return [pattern for pattern, fixed in patterns if fixed is None]


def _without_shared_inputs(blocks: list[Ran], ran: list[Ran]) -> list[Ran]:
    """Blocks side by side, which read the same tensor, are replaced by what they are parts of."""
    readers = [sum(other.given is block.given for other in blocks) for block in blocks]
    parents = {child: parent for parent in ran for child in parent.within}
    found = [parents[block] if count > 1 else block for block, count in zip(blocks, readers)]
    return [block for block in dict.fromkeys(found) if block.maps and block is not ran[0]]


def _units(parent: Ran) -> list[Ran]:
    """The modules within that may be blocks: with several layers, and none beside another that reads the same."""
    units = [r for r in parent.within if r.maps and r.layers > 1]
    return [r for r in units if sum(other.given is r.given for other in units) == 1]


def _expanded(block: Ran) -> list[Ran]:
    """The residual modules within a block that have most of its parameters; itself where it is one, or there are
    none.
    """
    inner = [] if block.is_residual else [b for unit in _units(block) for b in _expanded(unit) if b.is_residual]
    return inner if inner and sum(b.size for b in inner) >= COVERS * block.size else [block]


def layouts(blocks: list[Ran], seen: Trace, prefix: int) -> list[tuple[Hidden, Hidden]]:
    """The hidden states at the input and at the output of each block.

    prefix: how many class and register tokens there are where they have joined. Raises LayoutError where the layout
    can't be known.
    """
    read = {id(r.given): r.reads for r in seen.ran if r.given is not None and r.reads is not None}
    found: list[tuple[Hidden, Hidden]] = []
    before: tuple[torch.Size, int] | None = None
    for block in blocks:
        given, made = block.given, block.made
        dim = _channel_dim(given, read, block.widths, before)
        out = _channel_dim(made, read, block.widths, (given.shape, dim) if dim is not None else before)
        for x, known in ((given, dim), (made, out)):
            if known is None:
                raise LayoutError(f"the layout of {list(x.shape[1:])} at {block.name} can't be told from its layers")
        before = made.shape, out
        found.append((_hidden(given, dim, prefix, block.places[0]), _hidden(made, out, prefix, block.places[1])))
    return found


def _channel_dim(
    x: Tensor, read: dict[int, int], widths: Iterable[int], before: tuple[torch.Size, int] | None
) -> int | None:
    """Which dimension of x has the channels.

    As a layer reads it; as the widths of the layers say; the one beside a square map, as maps of square images are; as
    in the state before.
    """
    if id(x) in read:
        return read[id(x)]
    fits = [dim for dim in (1, x.ndim - 1) if x.shape[dim] in widths]
    beside_square = [dim for dim in (1, 3) if x.ndim == 4 and x.shape[2] == x.shape[4 - dim]]
    for found in (fits, beside_square):
        if len(found) == 1:
            return found[0]
    if before and len(before[0]) == x.ndim and before[1] in (fits or (1, x.ndim - 1)):
        return before[1]
    return None


def _hidden(x: Tensor, dim: int, prefix: int, place: int) -> Hidden:
    shape = tuple(x.shape[1:])
    if dim == 1:
        return Hidden("channels_first", shape, place=place)
    if x.ndim == 4:
        return Hidden("channels_last", shape, place=place)
    return Hidden("tokens", shape, _prefix(shape[0], prefix), place)


def _prefix(tokens: int, stated: int) -> int:
    """How many of these tokens are class or register tokens: those that leave a square grid, the stated number
    first.
    """
    fits = (count for count in (stated, 0, 1) if count < tokens and math.isqrt(tokens - count) ** 2 == tokens - count)
    return next(fits, min(stated, tokens - 1))
