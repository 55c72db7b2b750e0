"""Times blocks of a model by themselves: a pass of a large model takes a CPU seconds, one of its blocks a fraction.

Blocks of one kind are alike: their modules, the shapes of their tensors and of their inputs, and what trains in them.
One of each kind is timed, under the same memory of activations as in a run. It is `forward` of a block that runs, where
that memory takes hold: hooks on the block itself, such as those that read or extend its hidden states, stay out of it,
and are a part of what a pass takes beside its blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from s2a_cli.activations import ActivationMode, context_of
from s2a_cli.planner.candidates import Candidate, Mode
from s2a_cli.planner.timer import Timer


@dataclass
class Kind:
    """A kind of block: one of them, what it was given and returned in a pass of few images, and all of its places.

    given: the arguments of its forward, flat, of which number `at` is its hidden state x [B, ...]; spec: their
    structure. output: [B, ...]. x and output are detached.
    """

    block: nn.Module
    given: list[Any]
    spec: Any
    at: int
    needs_grad: bool  # x does
    output: Tensor
    places: list[int] = field(default_factory=list)

    def arguments(self, images: int) -> tuple[tuple, dict]:
        """Returns the arguments of forward for so many images, those that it was given over and over."""
        x = _images(self.given[self.at], images).requires_grad_(self.needs_grad)
        given = [*self.given]
        given[self.at] = x.clone()  # a leaf could not be changed in place, as what another block returns can be
        return tree_unflatten(given, self.spec)


class Blocks:
    """Times one block of each kind, forward and backward, and keeps the least seconds of each.

    timer: of the run. kinds: of its blocks, which `kinds_of` tells. total: blocks of the model.
    """

    def __init__(self, timer: Timer, kinds: list[Kind]):
        self.timer, self.kinds, self.total = timer, kinds, len(timer.attached.blocks)
        self._memories: dict[tuple[int, Mode], AbstractContextManager[Any]] = {}
        self._least: dict[tuple[int, Mode, int], float] = {}

    def __call__(self, mode: Mode, images: int) -> float | None:
        """Times one block of each kind in a mode, of so many images; returns the least seconds of all blocks up to now.

        None where the device has not the memory. The first pass in a mode fits codes, and does not count.
        """
        for number, kind in enumerate(self.kinds):
            if (number, mode) not in self._memories:
                self._memories[number, mode] = context_of(Candidate(1, mode, 1, 1).quant, [kind.block])
                if self._seconds(kind, mode, self._memories[number, mode], images) is None:
                    return None
            with _as_fitted(memory := self._memories[number, mode]):
                if (seconds := self._seconds(kind, mode, memory, images)) is None:
                    return None
            key = number, mode, images
            self._least[key] = min(seconds, self._least.get(key, seconds))
        return sum(len(kind.places) * seconds for kind, seconds in zip(self.kinds, self._each(mode, images)))

    def turn(self, mode: Mode, images: int) -> float:
        """Returns the seconds in which it is timed once more."""
        return sum(self._each(mode, images))

    def _each(self, mode: Mode, images: int) -> list[float]:
        """Returns the least seconds of a block of each kind."""
        return [self._least[number, mode, images] for number in range(len(self.kinds))]

    def _seconds(self, kind: Kind, mode: Mode, memory: AbstractContextManager[Any], images: int) -> float | None:
        (args, kwargs), step = kind.arguments(images), self.timer.step(Candidate(1))
        gradient = _images(kind.output, images)

        def run() -> None:
            with memory, step.autocast():
                output = kind.block.forward(*args, **kwargs)
            if output.requires_grad:
                output.backward(gradient)

        return self.timer.seconds(run, f"{mode.about}, a block of {images} images")

    def shares(self, mode: Mode, images: int) -> list[float]:
        """Returns the share of each of the model's blocks, in order, in what those take that a gradient passes."""
        each = dict.fromkeys(range(self.total), 0.0)
        for kind, seconds in zip(self.kinds, self._each(mode, images)):
            each |= dict.fromkeys(kind.places, seconds if kind.block in self.timer.passed else 0.0)
        whole = sum(each.values()) or 1.0
        return [seconds / whole for seconds in each.values()]


def kinds_of(timer: Timer, candidate: Candidate, images: int) -> list[Kind] | None:
    """Returns the kinds of blocks that run in a pass of so many images, which it takes in a candidate's mode.

    None where one block by itself does not stand for its part of a pass: where it runs not once, is given several
    tensors, or returns another thing than a tensor; and where the device has not the memory.
    """
    numbers = {block: number for number, block in enumerate(timer.attached.blocks) if block in timer.blocks}
    kinds: dict[Hashable, Kind] = {}
    ran: list[nn.Module] = []
    odd = False

    def note(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal odd
        given, spec = tree_flatten((args, kwargs))
        tensors = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
        ran.append(block)
        if len(tensors) != 1 or not isinstance(output, Tensor):
            odd = True
            return
        (at,) = tensors
        x, others = given[at], repr([spec, given[:at], given[at + 1 :]])
        odd = odd or not x.shape[:1] == output.shape[:1] == (images,)
        key = _structure(block), x.shape, x.dtype, x.requires_grad, output.shape, output.dtype, others
        if key not in kinds:
            given[at] = x.detach()
            kinds[key] = Kind(block, given, spec, at, x.requires_grad, output.detach())
        kinds[key].places.append(numbers[block])

    hooks = [block.register_forward_hook(note, prepend=True, with_kwargs=True) for block in numbers]
    try:
        fits = timer(candidate, images) is not None
    finally:
        for hook in hooks:
            hook.remove()
    alone = fits and not odd and len(ran) == len(numbers) == len(timer.blocks) and set(ran) == set(numbers)
    return list(kinds.values()) if alone else None


def _structure(block: nn.Module) -> Hashable:
    """Returns what is alike in blocks that compute alike: modules, their settings and hooks, tensors and what trains.

    Numbers with a fraction may differ: a rate of stochastic depth grows with depth.
    """
    modules = [(type(m), _settings(m), len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in block.modules()]
    tensors = [
        (name, t.shape, t.dtype, t.requires_grad) for name, t in (*block.named_parameters(), *block.named_buffers())
    ]
    return (*modules[0][:2], *modules[1:], *tensors)  # without hooks on the block itself, which do not run with it


def _settings(module: nn.Module) -> Hashable:
    """Returns the public attributes of a module that are names or whole numbers, such as the size of its windows."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return tuple((name, value) for name, value in own.items() if isinstance(value, (int, str)) or _are_whole(value))


def _are_whole(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, int) for one in value)


def _images(x: Tensor, images: int) -> Tensor:
    """Returns [images, ...] of x [B, ...], its samples over and over."""
    return x[torch.arange(images, device=x.device) % len(x)]


@contextmanager
def _as_fitted(memory: AbstractContextManager[Any]) -> Iterator[None]:
    """Fits codes to nothing further within."""
    with memory.calibration.paused() if isinstance(memory, ActivationMode) else nullcontext():
        yield
