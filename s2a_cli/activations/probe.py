"""Runs a sample through a block, to find what its graph keeps and which tensors train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]  (missing in torch's stubs)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from s2a_cli.activations.recompute import splits
from s2a_cli.common.errors import UserError

if TYPE_CHECKING:
    from s2a_cli.activations.checkpointing import Call


def mlps(block: nn.Module) -> list[nn.Module]:
    """Returns the multi-layer perceptrons within a block, as timm builds them: they hold its largest tensors."""
    return [m for m in block.modules() if m is not block and hasattr(m, "fc1") and hasattr(m, "fc2")]


@dataclass(frozen=True)
class Probe:
    """Holds what the graph of a sample shows of a block."""

    trained: list[Tensor]  # those that its output depends on, wherever they live, and all that train in the block
    kept: float  # bytes for the backward pass, of one sample
    unread: int  # which of its linear layers is the last, and has an output that backward does not read; or 0
    changes_input: bool  # in place
    shares: bool  # what takes part in the graph, is no input and has saved tensors of its own
    splits: bool  # whether what it returns is split by sample as its inputs are
    is_wide: bool  # whether a tensor within has more than twice the elements of its input and of its output
    flags: list[tuple[Tensor, bool]]  # the parameters that it read, and whether they were trained

    def holds(self) -> bool:
        """Returns whether the same parameters are trained as when it was made."""
        return all(parameter.requires_grad == flag for parameter, flag in self.flags)


class Reads(TorchFunctionMode):
    """Collects the parameters that functions are called with, and the size of the largest tensor that one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.widest = 0  # elements

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, nn.Parameter):
                self.found[id(x)] = x
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.widest = max(self.widest, out.numel())
        return out


def probe(call: Call, inputs: list[Tensor]) -> Probe:
    """Runs the block on these samples with a graph, and returns what it shows."""
    mode, module = call.block.mode, call.block.module
    own = {t.shape for t in (*module.parameters(), *module.buffers())}  # autocast saves copies of weights
    kept: dict[int, int] = {}  # bytes by storage
    last = -1  # how many linear layers were over when something was last saved

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        storage = (tensor._values() if tensor.is_sparse else tensor).untyped_storage()
        if tensor.shape not in own:
            kept[storage._cdata], last = storage.nbytes(), counters.linears
        return tensor.detach()  # not itself: a node that holds its own output is never freed

    buffers = [(name, buffer, buffer._version) for name, buffer in module.named_buffers()]
    begun = _autograd._get_sequence_nr()
    starts, reads = [x.detach().requires_grad_(x.requires_grad) for x in inputs], Reads()
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mode.calibration.paused(), mode.counting() as counters, saved, reads:
        samples = [start.clone() for start in starts]
        versions = [sample._version for sample in samples]
        outputs = call(samples)
    if changed := [name for name, buffer, version in buffers if buffer._version != version]:
        raise UserError(
            f"block {call.block.index} ({type(module).__name__}) changes its buffer {changed[0]} in each pass, which"
            " recompute='block' and chunks do again: set recompute='none' and chunks=1"
        )
    reads.found.update((id(p), p) for p in module.parameters())
    trained = {id(x): x for x in leaves(outputs) if not any(x is start for start in starts)}
    # Another sample may take another way through the block, as a mixture of experts has them.
    trained |= {id(p): p for p in module.parameters() if p.requires_grad}
    return Probe(
        trained=list(trained.values()),
        kept=sum(kept.values()) / len(inputs[0]),
        unread=counters.linears if last < counters.linears else 0,
        shares=any(_keeps_tensors(node) for node in nodes(outputs) if node._sequence_nr() < begun),
        changes_input=versions != [sample._version for sample in samples],
        splits=splits(outputs, None if call.is_whole else len(samples[0])),
        is_wide=reads.widest > 2 * max(x.numel() for x in (*samples, *outputs)),
        flags=[(p, p.requires_grad) for p in reads.found.values()],
    )


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors without a history whose gradients a backward pass from these would find, in a fixed order."""
    return [node.variable for node in nodes(outputs) if hasattr(node, "variable")]


def nodes(outputs: Iterable[Tensor]) -> list[Any]:
    """Returns the nodes of the graph behind these tensors, in a fixed order."""
    found: dict[Any, None] = {}
    todo: list[Any] = [y.grad_fn for y in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in found:
            continue
        found[node] = None
        todo.extend(function for function, _ in node.next_functions)
    return list(found)


def _keeps_tensors(node: Any) -> bool:
    """Tells whether a node of a graph has saved tensors, which a backward pass frees."""
    return any(name.startswith("_raw_saved_") for name in dir(node))
