"""Plans the steps of a training loop of one's own: `s2a_cli.plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from s2a_cli.common.arguments import check_type
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import QuantConfig
from s2a_cli.library.attach import Attached
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB
from s2a_cli.planner import plan as planning
from s2a_cli.planner.sizes import size
from s2a_cli.planner.task import Task
from s2a_cli.results import plan_text, record


@dataclass(frozen=True)
class StepPlan:
    """States how the steps of a loop fit a budget: print it to see what was chosen from.

    micro_batch: images a forward pass. quant: for `compress_activations(plan.quant, attached.blocks)`. needed_mib: what
    is predicted to be needed of the budget.
    """

    micro_batch: int
    quant: QuantConfig
    needed_mib: float
    about: str
    record: record.Plan

    def __str__(self) -> str:
        text = plan_text.render(self.record)
        return text[: text.rindex("\n\n")]  # without the words of the command line


def plan(
    attached: Attached,
    images: Tensor,
    targets: Tensor,
    budget: str,
    *,
    fidelity: str = "exact",
    precision: str = "fp32",
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> StepPlan:
    """Plans the fastest way to train on batches like this one within a budget; takes some ten seconds.

        chosen = s2a_cli.plan(attached, images, labels, "2GiB")
        memory = s2a_cli.compress_activations(chosen.quant, attached.blocks)
        for part, label in zip(images.split(chosen.micro_batch), labels.split(chosen.micro_batch)):
            with memory:
                loss = cross_entropy(model(part), label) * len(part) / len(images)
            loss.backward()

    attached: what `attach` returned, of a model that takes square images [B, 3, H, H]; it is left as found, but for
    gradients, which are none then. images, targets: a whole batch of an optimiser's step. budget: memory that a step of
    AdamW may take, such as "900MiB"; on CUDA that of the device, its context and a margin included. fidelity: "exact",
    "0.999" or "0.99", the least cosine of the gradient with the exact one. precision: "fp32", "amp-bf16" or "amp-fp16",
    as the loop has it. criterion: criterion(logits [B, classes], targets) returns a scalar.

    Raises UserError where nothing fits, and for what is no such model or setting.
    """
    check_type("attached", attached, Attached, "what s2a_cli.attach returned")
    check_type("images", images, Tensor, "a tensor [B, 3, H, H]")
    check_type("targets", targets, Tensor, "a tensor")
    side = attached.attachment.backbone.image.size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side) or len(images) != len(targets):
        raise UserError(
            f"images {list(images.shape)}, targets {list(targets.shape)}: expected [B, 3, {side}, {side}] and a target"
            " for each"
        )
    # The settings of a step; what it trains is the model that is given.
    config = compose(
        ["method=linear", f"optim.batch_size={len(images)}", f"precision={precision}", f"budget={budget}"]
        + [f"fidelity={fidelity}"]
    )
    # In a loop of one's own no classifier learns within the forward pass.
    attachment = replace(attached.attachment, auxiliary=())
    device = next(attached.model.parameters()).device
    modes = {module: module.training for module in attached.model.modules()}
    rounding = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    margin = Margin() if device.type == "cuda" else None
    classes = attachment.backbone.head.classes
    task = Task(config, attachment, classes, len(images), size("budget", budget), margin, dtype=images.dtype)

    def nothing(least: float) -> str:
        return f"budget={budget}: nothing fits; the least that a step takes is predicted to be {least / MIB:,.0f} MiB"

    try:
        drawing = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(drawing):  # pyright: ignore[reportUnknownMemberType]  (torch leaves it untyped)
            made = planning.make(task, (images, targets), device, lambda _: attachment, nothing, criterion=criterion)
    finally:
        torch.set_float32_matmul_precision(rounding[0])
        torch.backends.cudnn.allow_tf32 = rounding[1]
        for module, mode in modes.items():
            module.training = mode
    best, settings = made["choices"][0], made["settings"]
    micro_batch = settings["optim.micro_batch"] or len(images)
    return StepPlan(micro_batch, QuantConfig(**settings["quant"]), best["needed_mib"] or 0.0, best["about"], made)
