"""Presents a classification model as stem, blocks and head.

Nothing outside this package asks which family a model belongs to.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from s2a_cli.backbones.branches import Branch, find_branches, is_linear, linear_layers
from s2a_cli.backbones.head import Head
from s2a_cli.backbones.hidden import Hidden
from s2a_cli.backbones.stored import Stored
from s2a_cli.backbones.trace import (
    LayoutError,
    Sample,
    find_blocks,
    images_of,
    layouts,
    run_on_zeros,
    run_without_data,
    trace,
)
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import owner_of
from s2a_cli.common.norms import forget_bias_gradient, keep_bias_gradient
from s2a_cli.common.text import first_line
from s2a_cli.data.transforms import ImageConfig

ADDED = "s2a"  # the submodule of the model that holds what a method adds


class Added(nn.ModuleDict):
    """Holds what a method adds to a model; passes on what it gets, as an nn.Sequential calls all that it holds."""

    def forward(self, x: Any) -> Any:
        return x


@dataclass(frozen=True)
class Block:
    """One of a backbone's repeated blocks, with the hidden states at its input and at its output.

    branches: the residual branches of a transformer block, attention and MLP; empty for blocks of other kinds. layers:
    (name, module) of the linear layers and convolutions within, in the order in which they run.
    """

    name: str
    module: nn.Module
    input: Hidden
    output: Hidden
    branches: tuple[Branch, ...] = ()
    layers: tuple[tuple[str, nn.Module], ...] = ()

    def branch(self, kind: str) -> Branch:
        """Returns the first branch of a kind, attention or mlp. Raises LookupError where there is none."""
        found = next((branch for branch in self.branches if branch.kind == kind), None)
        if found is None:
            raise LookupError(f"block {self.name} has no residual branch of {kind}")
        return found


class Backbone:
    """A classification model in which every parameter but the head's is frozen.

    `model` is the one nn.Module. Modules that a method adds live in `model.s2a` and act through forward hooks.
    sample: what the model takes for one sample; an image [3, size, size] where it is left out. blocks: its repeated
    blocks, where they are not to be found. Raises UserError where the model can't take its images, or does not return
    one logit a class.
    """

    def __init__(
        self,
        model: nn.Module,
        image: ImageConfig,
        head: Head,
        *,
        sample: Sample | None = None,
        blocks: Collection[nn.Module] = (),
    ):
        self.model, self.image, self.head = model, image, head
        self._sample = sample or images_of(image.size)
        model.requires_grad_(False)
        for parameter in head.parameters():
            parameter.requires_grad_(True)
        self._find_blocks(blocks)
        self._pretrained = [name for name in model.state_dict() if not head.holds(name)]
        self._pretrained_parameters = sum(p.numel() for name, p in model.named_parameters() if not head.holds(name))

    def _find_blocks(self, given: Collection[nn.Module]) -> None:
        """Finds the blocks, or why there are none, by a forward pass without data.

        Raises UserError where the model can't take its images, or does not return one logit a class.
        """
        kind, size = type(self.model).__name__, self.image.size
        try:
            seen = trace(self.model, self._sample)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"backbone: what {kind} computes depends on values of its images: {first_line(error)}"
            ) from None
        except Exception as error:  # models check their input in ways of their own
            raise UserError(f"backbone.image_size={size}: {kind} can't take it: {first_line(error)}") from None
        if not isinstance(seen.output, Tensor) or seen.output.shape[1:] != (self.head.classes,):
            raise UserError(f"backbone: {kind} does not return one logit a class, so it can't be fine-tuned here")
        # Kept by module: one that a method puts into another keeps its place, whatever its name is then.
        self._order = {module: seen.order[name] for name, module in self.model.named_modules()}
        self._ran = {found.module for found in seen.ran}
        self._blocks, self._problem = [], f"no repeated blocks were found in {kind}"
        found = find_blocks(self.model, seen, given)
        self.parts = {block.name: block.module for block in found}  # the blocks, also where their layouts are not known
        try:
            first = self._sample[0]
            image = (first.shape[1], first.shape[2]) if first.ndim == 3 else (1, 1)
            states = layouts(found, seen, getattr(self.model, "num_prefix_tokens", 0), image)
            self._blocks = [
                Block(block.name, block.module, *pair, find_branches(block), linear_layers(block))
                for block, pair in zip(found, states)
            ]
        except LayoutError as error:
            self._problem = f"{kind}: {error}"

    @property
    def block_modules(self) -> list[nn.Module]:
        """Returns the modules of the blocks in order, also where the layouts of hidden states are not known."""
        return list(self.parts.values())

    @property
    def blocks(self) -> list[Block]:
        """Returns all blocks in order. Raises UserError where they or the layouts of hidden states are not known."""
        if not self._blocks:
            raise UserError(
                f"backbone: {self._problem}; what needs no blocks works: method=full, linear, or bias with"
                " method.blocks=all"
            )
        return self._blocks

    def check_recomputable(self) -> None:
        """Raises UserError where there are no blocks to recompute."""
        if not self.parts:
            raise UserError(f"quant.recompute=block: {self._problem}; quant=int4 and others that keep codes alone work")

    def adapted_blocks(self, blocks: str) -> list[Block]:
        """Returns the blocks that `all` or `last:K` names, in order. Raises UserError where there are fewer than K."""
        if blocks == "all":
            return self.blocks
        match = re.fullmatch(r"last:0*([1-9]\d*)", blocks)
        if not match or int(match[1]) > len(self.blocks):
            raise UserError(
                f"method.blocks={blocks}: accepted are all and last:1 to last:{len(self.blocks)} for this backbone"
            )
        return self.blocks[-int(match[1]) :]

    def adapted_modules(self, blocks: str) -> Iterator[tuple[str, nn.Module]]:
        """Yields (name, module) of what runs in or after the first adapted block; with `all`, of every module.

        Leaves out the head and what a method added, also around or within modules of the backbone.
        """
        start, head = 0 if blocks == "all" else self._order[self.adapted_blocks(blocks)[0].module], self.head.layers
        for name, module in self.model.named_modules():
            if module not in head.values() and self._order.get(module, -1) >= start:
                yield name, module

    def unfreeze(self, blocks: str, chosen: Callable[[str, nn.Module], bool] = lambda name, module: True) -> None:
        """Has parameters of the `adapted_modules` trained: those for whose name and module `chosen` is true."""
        for path, module in self.adapted_modules(blocks):
            for name, parameter in module.named_parameters(path, recurse=False):
                if chosen(name, module):
                    parameter.requires_grad_(True)
                    keep_bias_gradient(module)

    def in_order(self, layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
        """Returns layers as they run, in groups: those of each block, and each other one by itself."""
        block_of = {inner: block for block in self.block_modules for inner in block.modules()}
        groups: dict[nn.Module, list[nn.Module]] = {}
        for layer in sorted(layers, key=lambda layer: self._order.get(layer, -1)):
            groups.setdefault(block_of.get(layer, layer), []).append(layer)
        return list(groups.values())

    def runs(self, name: str) -> bool:
        """Tells whether the module of this name runs, rather than that its parent reads its tensors."""
        return self.model.get_submodule(name) in self._ran

    def blocks_before(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Returns the first blocks, of which none holds or runs behind one of these modules."""
        block_of = {inner: block for block in self.block_modules for inner in block.modules()}
        least = min((self._order.get(block_of.get(module, module), -1) for module in modules), default=len(self._order))
        return [block for block in self.block_modules if self._order[block] < least]

    def embedding(self) -> nn.Linear | nn.Conv2d | None:
        """Returns the last linear layer or convolution that runs before the blocks; None where there is none."""
        first = self._order[self.blocks[0].module]
        before = [module for module, order in self._order.items() if is_linear(module) and order < first]
        return cast(nn.Linear | nn.Conv2d, max(before, key=self._order.__getitem__)) if before else None

    def takes_more_tokens(self, blocks: Sequence[Block]) -> bool:
        """Tells whether these blocks work with another token behind those of the image.

        Blocks that know how many there are don't, as position biases between tokens and rotary embeddings do. The one
        more is no multiple of any window, so that blocks that attend in windows are found out.
        """
        if any(hidden.layout != "tokens" for block in blocks for hidden in (block.input, block.output)):
            return False
        with ExitStack() as stack:
            for block in blocks:
                more = block.module.register_forward_pre_hook(functools.partial(_one_more, block), with_kwargs=True)
                stack.callback(more.remove)
                less = block.module.register_forward_hook(functools.partial(_one_less, block), prepend=True)
                stack.callback(less.remove)
            log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback of each failure
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL)
            try:
                run_without_data(self.model, self._sample)
            except Exception:  # models fail in ways of their own
                return False
        return True

    def problem(self) -> str:
        """Returns why the model can't take its images, as it is now; empty where it can. It is run, on zeros."""
        try:
            run_on_zeros(self.model, self._sample)
        except Exception as error:  # models fail in ways of their own
            return first_line(error)
        return ""

    def add(self, name: str, module: nn.Module) -> None:
        """Adds a trainable module as `model.s2a.<name>`, which is trained and saved with the run.

        Raises UserError where there is one of that name.
        """
        if not hasattr(self.model, ADDED):
            self.model.add_module(ADDED, Added())
        if name in getattr(self.model, ADDED):
            raise UserError(f"method: two of its structures add {name}; name one of them")
        getattr(self.model, ADDED)[name] = module.to(next(self.head.parameters()).device)

    def remove_added(self) -> None:
        """Removes every module that a method added, and the hooks by which they act."""
        added = set(getattr(self.model, ADDED, nn.Module()).modules())
        for module in self.model.modules():
            forget_bias_gradient(module)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number, hook in list(hooks.items()):
                    if owner_of(hook) in added:
                        del hooks[number]
                        module._forward_pre_hooks_with_kwargs.pop(number, None)
        if hasattr(self.model, ADDED):
            delattr(self.model, ADDED)

    def fingerprint(self) -> str:
        """Returns 12 hex digits of the SHA-256 of the pretrained tensors, without those of the head and of a method."""
        digest, state = hashlib.sha256(), self.model.state_dict()
        for name in self._pretrained:
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

    def count(self) -> dict[str, float]:
        """Returns numbers of parameters: total, trainable (without the head) and head, those of it that train.

        percent: the trainable ones in percent of the pretrained ones, without the head; 0 where nothing is pretrained.
        """
        head = sum(p.numel() for p in self.head.parameters() if p.requires_grad)
        stored = sum(module.elements for module in self.model.modules() if isinstance(module, Stored))
        total = sum(p.numel() for p in self.model.parameters()) + stored
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad) - head
        return {
            "total": total,
            "trainable": trainable,
            "head": head,
            "percent": 100 * trainable / max(self._pretrained_parameters, 1),
        }


def _one_more(block: Block, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Appends a token to the hidden state that a block takes."""
    x = block.input.of((args, kwargs))
    return block.input.replaced((args, kwargs), torch.cat([x, x[:, :1]], dim=1))


def _one_less(block: Block, module: nn.Module, args: tuple, output: Any) -> Any:
    """Takes the last token off again. Raises ValueError where it is not there."""
    x = block.output.of(output)
    if x.shape[1] != block.output.positions + 1:
        raise ValueError(f"{block.name} changes the number of tokens")
    return block.output.replaced(output, x[:, :-1])
