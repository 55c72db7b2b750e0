"""Follows a training step from outside: which phase and which part of the model runs, and what tensors are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from s2a_cli.common.hooks import reads_output_only
from s2a_cli.memory.families import of_module
from s2a_cli.memory.tracker import Tracker

STATIC = ("weights", "trainable", "optimiser", "buffers")
USES = (*STATIC, "gradients", "batch", "kept", "transient")  # what memory is for
NAMES = {  # of these, to read
    "weights": "weights, frozen",
    "trainable": "weights, trainable",
    "optimiser": "optimiser state",
    "buffers": "buffers",
    "gradients": "gradients",
    "batch": "images and targets",
    "kept": "kept for backward",
    "transient": "transient",
}
OUTSIDE = "loss and update"  # the place of what runs in no module


class Watch:
    """Fills in the tracker's records of a step: their use, and the places of the model in which they were made.

    A context: it adds hooks to the model and the optimiser, and takes them away at its end.
    """

    def __init__(
        self, tracker: Tracker, model: nn.Module, optimizer: Optimizer, blocks: Mapping[str, nn.Module] | None
    ):
        self.tracker, self.model, self.optimizer = tracker, model, optimizer
        self.static = 0  # bytes between steps
        self.kept: list[int] = []  # bytes after each forward pass of a step, less `static`
        self.phases: list[tuple[int, str]] = []  # number of the event with which a phase begins
        self.places = _places(model, blocks)
        self._stack: list[str] = []  # the places around the one that runs
        self._name_weights()

    def __enter__(self) -> Watch:
        with ExitStack() as hooks:
            for name, module in self.places.items():
                hooks.callback(
                    module.register_forward_pre_hook(lambda *_, name=name: self._enters(name), prepend=True).remove
                )
                hooks.callback(module.register_forward_hook(reads_output_only(lambda *_: self._leaves())).remove)
            hooks.callback(self.model.register_forward_pre_hook(lambda *_: self._phase("forward"), prepend=True).remove)
            hooks.callback(self.optimizer.register_step_pre_hook(lambda *_: self._updates()).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def step_begins(self) -> None:
        """Names what is alive: it stays between steps."""
        for parameter, state in self.optimizer.state.items():
            self._name(tree_leaves(state), "optimiser", parameter)
        for allocation in self.tracker.alive():
            allocation.use = allocation.use if allocation.use in STATIC else "buffers"
        self.static = self.tracker.live
        self.tracker.reset()
        self.kept.clear()
        self.phases.clear()
        self._stack.clear()
        self.tracker.moved(OUTSIDE)

    def batch(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Returns the batch on the device: clones of the tensors."""
        copies = [tensor.clone() for tensor in tensors]
        self._name(copies, "batch")
        return copies

    def after_forward(self) -> None:
        """Names what a forward pass has kept for its backward pass, which begins now."""
        self.kept.append(self.tracker.live - self.static)
        self._gradients()
        for allocation in self.tracker.alive():
            allocation.use = allocation.use or "kept"
        self._phase("backward")

    def _updates(self) -> None:
        """Notes that the optimiser begins its update."""
        self._gradients()
        self._phase("update")
        self.tracker.place = OUTSIDE

    def _gradients(self) -> None:
        for parameter in self.model.parameters():
            self._name([parameter.grad], "gradients", parameter)

    def _phase(self, name: str) -> None:
        self.phases.append((len(self.tracker.events), name))
        self.tracker.reading = name == "forward"

    def _enters(self, name: str) -> None:
        self._stack.append(self.tracker.place)
        self.tracker.moved(name)

    def _leaves(self) -> None:
        self.tracker.moved(self._stack.pop() if self._stack else OUTSIDE)

    def _name(self, tensors: Iterable[Tensor | None], use: str, parameter: Tensor | None = None) -> None:
        """Notes what tensors are for; those of a parameter get its place."""
        owner = self.tracker.allocation(parameter) if parameter is not None else None
        for tensor in tensors:
            allocation = self.tracker.allocation(tensor) if isinstance(tensor, Tensor) else None
            if allocation and allocation.use in ("", "kept", "buffers"):
                allocation.use = use
                if owner:
                    allocation.place, allocation.operator = owner.place, owner.operator

    def _name_weights(self) -> None:
        """Registers the parameters and buffers of the model, with their use and place."""
        for path, module in self.model.named_modules():
            place = next((name for name in _prefixes(path) if name in self.places), path.partition(".")[0] or "model")
            buffers = "weights" if getattr(module, "stores_weights", False) else "buffers"
            for own, use in ((module._buffers, buffers), (module._parameters, "")):
                for tensor in own.values():
                    if tensor is None:
                        continue
                    self.tracker.add([tensor])
                    if allocation := self.tracker.allocation(tensor):
                        allocation.use = use or ("trainable" if tensor.requires_grad else "weights")
                        allocation.place, allocation.operator = place, of_module(module)


def _prefixes(path: str) -> list[str]:
    """Returns a dotted path and those of its parents, the longest first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _places(model: nn.Module, blocks: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """Returns the parts of a model that are told apart: its blocks, and its children that hold no block.

    Without blocks these are its children, and theirs where a child is but a list.
    """
    if blocks is None:
        lists = {
            name: child for name, child in model.named_children() if isinstance(child, nn.Sequential | nn.ModuleList)
        }
        blocks = {
            f"{name}.{inner}": module for name, child in lists.items() for inner, module in child.named_children()
        }
    others = {
        name: child
        for name, child in model.named_children()
        if not any(block == name or block.startswith(f"{name}.") for block in blocks)
    }
    return {**others, **blocks}
