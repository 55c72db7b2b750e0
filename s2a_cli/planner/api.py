"""Predicts the memory of any model's training step: `s2a_cli.predict_memory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from s2a_cli.activations import compress_activations
from s2a_cli.common.arguments import check_type
from s2a_cli.config.schema import QuantConfig
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.predict import inputs_of, profile
from s2a_cli.training.step import AUTOCAST


def predict_memory(
    model: nn.Module,
    batch: Tensor | Sequence[Tensor] | Sequence[int],
    loss: Callable[..., Tensor] | None = None,
    *,
    targets: Tensor | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.AdamW,
    precision: str = "fp32",
    quant: QuantConfig | str | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
) -> Profile:
    """Predicts the memory of one training step of a model on CUDA: forward, loss, backward, update. Needs no GPU.

        predicted = s2a_cli.predict_memory(model, (64, 3, 224, 224))
        predicted.memory.peak_mib, predicted.by("use"), predicted.by("family", uses=["kept"])

    model: with `requires_grad` and training mode set as in training; on any device, "meta" included. Left as found.
    batch: what the model is called with: one tensor or several (only shapes and dtypes are read), or a shape, such as
        (64, 3, 224, 224), in the dtype of the weights.
    loss: `loss(output)`, or `loss(output, targets)` with targets, returns a scalar; None takes the mean of all outputs
        in float32.
    targets: of the batch, such as torch.empty(64, dtype=torch.long).
    optimizer: called with the list of trainable parameters.
    precision: fp32 (the model and the batch as they are), amp-bf16 or amp-fp16 (under autocast).
    quant: what is kept for the backward pass, as `compress_activations` takes it: a QuantConfig, or a name such as
        "tiny"; None keeps what PyTorch itself keeps.
    blocks: {name: module} that the breakdown tells apart, and that `quant.recompute` and `quant.chunks` are about.

    Returns a Profile: `memory` (peak, static and kept MiB; its kind is "predicted"), `parts` (what is alive at the
    peak, in bytes that add up to it), `phase` and `place` of the peak, `timeline`. Where a mask chooses elements, all
    are taken to be chosen. Raises UserError for what is no model, blocks or quant, ValueError for settings that don't
    fit, torch's DataDependentOutputException or
    DynamicOutputShapeException where memory depends on the data in another way and NotImplementedError for an operator
    on sparse tensors that can't be run without data, each with the name of the operator, and whatever the model raises.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("batch", batch, (Tensor, Sequence), "tensors, or a shape such as (64, 3, 224, 224)")
    check_type("blocks", blocks, (Mapping, nn.ModuleDict, type(None)), "{name: module}")
    if precision not in ("fp32", *AUTOCAST):
        raise ValueError(f"precision={precision!r}: expected one of fp32, {', '.join(AUTOCAST)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter with requires_grad: there is nothing to train")
    if targets is not None and loss is None:
        raise ValueError("targets need a loss(output, targets)")
    inputs = inputs_of(model, batch)
    compressing = compress_activations(quant, (blocks or {}).values()) if quant else nullcontext()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "amp-fp16")

    def step(model: nn.Module, optimizer: Optimizer, *tensors: Tensor, after_forward: Callable[[], None]) -> None:
        """Runs forward, loss, backward and update, as a training loop does."""
        tensors, wanted = (tensors, ()) if targets is None else (tensors[:-1], tensors[-1:])
        with torch.autocast("cpu", AUTOCAST[precision]) if precision in AUTOCAST else nullcontext():
            with compressing:
                output = model(*tensors)
            value = loss(output, *wanted) if loss else _mean(output)
        after_forward()
        scaler.scale(value).backward()  # pyright: ignore[reportUnknownMemberType]  (torch leaves it untyped)
        del output, value
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def make_optimizer(model: nn.Module) -> Optimizer:
        """Returns the optimiser of the parameters that are trained."""
        return optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    return profile(model, [*inputs, *([] if targets is None else [targets])], step, make_optimizer, blocks)


def _mean(output: object) -> Tensor:
    """Returns the sum of the means of all outputs with a gradient."""
    means = [leaf.float().mean() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.as_tensor(sum(means))
