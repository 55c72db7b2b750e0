"""quant=auto: the settings of each block with the least error in the gradient whose predicted peak fits a budget.

In the order of speed, the first of these that fits is taken:

1. stock PyTorch, then the lossless savings alone;
2. codes: bits for each block and family of operators, if the gradient's error, measured, is at most `TOLERANCE`;
3. blocks computed again from inputs of 8 bits, in more and more batch chunks; then from fewer bits, block by block.

How much a code costs is measured on images of the run (the S2A paper's "gradient-informed precision allocation"): the
relative error e of the whole gradient when one family of one block alone is coded in `REFERENCE_BITS` bits. Each
further bit halves it, and errors of different operators are independent: the expected square error of an allocation is
the sum of e^2 4^(REFERENCE_BITS - bits). It is convex in the bits, so that giving bits one by one to whoever gains most
for its bytes is optimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from s2a_cli.activations import REFERENCE
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.config.schema import QuantConfig
from s2a_cli.config.settings import merge
from s2a_cli.memory import saved_bytes
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.training.criterion import Criterion
from s2a_cli.training.step import Step, train_mode

TOLERANCE = 0.045  # relative error of the gradient: a cosine of 0.999
REFERENCE_BITS = 4
BITS = (2, 3, 4, 5, 6, 8)
INPUT_BITS = (4, 5, 6, 8)
CODED = ("pointwise", "norm", "attention", "softmax")  # families of operators
PIECES = (None, 8)  # of the batch, for coded blocks
FINER = (None, 8, 16)  # for recomputed ones
ROUNDS = 4  # of predicting an allocation and correcting what it may keep
IMAGES = 8  # that costs are measured on

Peak = Callable[..., float]  # (quant) or (quant, micro_batch) -> predicted, MiB
Key = tuple[int, str]  # the number of a block, and a family or "input"


@dataclass
class Costs:
    """States what one bit of a family in a block costs in bytes, and how much error `REFERENCE_BITS` bits make."""

    bytes: dict[Key, float] = field(default_factory=dict)
    error: dict[Key, float] = field(default_factory=dict)  # relative, of the whole gradient

    def expected(self, bits: dict[Key, int]) -> float:
        """Returns the relative error of the gradient under an allocation."""
        return math.sqrt(sum(self._square(key, count) for key, count in bits.items()))

    def _square(self, key: Key, bits: int) -> float:
        return self.error[key] ** 2 * 4.0 ** (REFERENCE_BITS - bits)

    def spread(self, mib: float, choices: tuple[int, ...]) -> dict[Key, int] | None:
        """Returns the bits with the least expected error that take at most `mib`; None where the fewest take more."""
        bits = dict.fromkeys(self.bytes, choices[0])
        left = mib * MIB - sum(self.bytes.values()) * choices[0]
        if left < -0.5:  # bytes; less is rounding
            return None
        while True:
            offers = []
            for key, now in bits.items():
                more = choices[choices.index(now) + 1 :][:1]
                if more and (price := self.bytes[key] * (more[0] - now)) <= left:
                    gain = self._square(key, now) - self._square(key, more[0])
                    offers.append((gain / max(price, 1), key, more[0], price))
            if not offers:
                return bits
            _, key, count, price = max(offers)
            bits[key], left = count, left - price


@dataclass
class Choice:
    quant: QuantConfig
    peak_mib: float  # predicted
    error: float  # of the gradient, relative, measured on the images that the costs were measured on

    def describe(self) -> str:
        """Returns one line for people."""
        quant, words = self.quant, []
        if quant.recompute == "block":
            words.append("blocks recomputed from inputs of " + _span(b["input"] for b in quant.blocks.values()))
        for family in CODED:
            bits = [block[family] for block in quant.blocks.values() if block.get(family)]
            words += [f"{family} {_span(bits)}"] if bits else []
        if not words:
            words.append("lossless savings" if quant.lossless else "stock PyTorch")
        if quant.chunks != 1:
            words.append(
                f"{quant.chunks} chunks of the batch"
                if quant.chunks
                else "the batch in chunks as the device wants them"
            )
        error = f"relative error of the gradient {self.error:.2g}" if self.error else "the gradient is exact"
        return (
            f"quant=auto: {', '.join(words)}: predicted peak {self.peak_mib:,.1f} of {quant.budget_mib:g} MiB, {error}"
        )


def _span(bits: Iterable[int]) -> str:
    low, high = min(bits := list(bits)), max(bits)
    return f"{low} bits" if low == high else f"{low} to {high} bits"


class Gradient:
    """Computes the gradient of a run on some of its images, under other quant settings.

    batch: training images [B, 3, H, W] and targets, on any device. criterion: see Step.
    """

    def __init__(
        self,
        config: DictConfig,
        attached: Attachment,
        batch: tuple[Tensor, Tensor],
        device: torch.device,
        criterion: Criterion | None = None,
    ):
        self.config, self.attached, self.device, self.criterion = config, attached, device, criterion
        self.images, self.targets = (tensor.to(device) for tensor in batch)
        self.base = replace(REFERENCE, recompute="block", group=config.quant.group)  # exact, in little memory
        train_mode(attached.model)
        self._exact = self._of(self.base)

    def error(self, quant: QuantConfig) -> float:
        """Returns the relative error that these settings make."""
        difference = torch.linalg.vector_norm(self._of(quant) - self._exact)
        return (difference / torch.linalg.vector_norm(self._exact)).item()

    def kept(self, quant: QuantConfig) -> int:
        """Returns the bytes kept of one image."""
        return saved_bytes(lambda: self._step(quant).logits(self.attached.model, self.images[:1]), self.attached.model)

    def _step(self, quant: QuantConfig) -> Step:
        changed = merge(self.config, {"quant": OmegaConf.structured(quant)})
        return Step(changed, self.device, self.attached, self.criterion)

    def _of(self, quant: QuantConfig) -> Tensor:
        """Returns the gradient of all that trains as one vector, under the same random numbers each time."""
        step, trained = self._step(quant), [p for p in self.attached.model.parameters() if p.requires_grad]
        torch.manual_seed(self.config.seed)
        loss = step.losses(self.attached.model, self.images, self.targets).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return torch.cat([g.flatten().double() for g in found if g is not None])


def budget_of(quant: QuantConfig) -> float:
    """Returns the peak in MiB that these settings are chosen for."""
    assert quant.budget_mib is not None
    return quant.budget_mib


def allocate(gradient: Gradient, peak: Peak) -> Choice:
    """Chooses the settings of a run whose config has quant.budget_mib.

    peak: predicts the step of the run with other quant settings, in MiB. Raises UserError where nothing fits, and says
    what would.
    """
    asked = cast(QuantConfig, OmegaConf.to_object(gradient.config.quant))
    for quant in (replace(asked, lossless=False), asked):
        if (found := peak(quant)) <= budget_of(asked):
            return Choice(quant, found, 0.0)
    codes = measure(gradient, CODED)
    for chunks in PIECES if codes.bytes else ():
        choice = _fit(replace(asked, chunks=chunks), codes, BITS, gradient, peak)
        if choice and choice.error <= TOLERANCE:
            return choice
    # What is coded outside of blocks, such as the last normalisation, takes little in 8 bits.
    asked = replace(asked, recompute="block", norm=8)
    inputs = measure(gradient, ("input",))
    for chunks in FINER:
        choice = _fit(replace(asked, chunks=chunks), inputs, INPUT_BITS, gradient, peak)
        if choice and choice.error <= TOLERANCE:
            return choice
    if not choice:
        raise UserError(_what_would(gradient.config, asked, inputs, peak))
    return choice


def _what_would(config: DictConfig, asked: QuantConfig, inputs: Costs, peak: Peak) -> str:
    """Says that nothing fits, and what would.

    That is the largest micro-batch, or a method without a backward pass through the backbone.
    """
    least = _applied(replace(asked, chunks=FINER[-1]), dict.fromkeys(inputs.bytes, INPUT_BITS[0]))
    said = (
        f"quant.budget_mib={asked.budget_mib:g}: nothing fits; the smallest predicted peak of this run is"
        f" {peak(least):,.1f} MiB"
    )
    size = config.optim.micro_batch or config.optim.batch_size
    while size > 1:
        size //= 2
        if (found := peak(least, size)) <= budget_of(asked):
            return f"{said}; optim.micro_batch={size} would fit ({found:,.1f} MiB)"
    return (
        f"{said}, and {found:,.1f} MiB with one image at a time; method=side, a smaller backbone or"
        " backbone.weights=int8 need less"
    )


def _fit(quant: QuantConfig, costs: Costs, choices: tuple[int, ...], gradient: Gradient, peak: Peak) -> Choice | None:
    """Returns the bits with the least error whose predicted peak fits; None where even the fewest do not."""
    fewest, most = (bits * sum(costs.bytes.values()) / MIB for bits in (choices[0], choices[-1]))
    segments = gradient.config.method.get("segments", 1)  # of which one is alive at the peak
    allowed = most
    for _ in range(ROUNDS):
        bits = costs.spread(allowed, choices)
        if bits is None:
            return None
        applied = _applied(quant, bits)
        found = peak(applied)
        if found <= budget_of(quant):
            return Choice(applied, found, gradient.error(applied))
        used = sum(costs.bytes[key] * count for key, count in bits.items()) / MIB
        allowed = max(fewest, used - (found - budget_of(quant)) * segments)
    return None


def _applied(quant: QuantConfig, bits: dict[Key, int]) -> QuantConfig:
    blocks: dict[int, dict[str, int]] = {}
    for (block, family), count in bits.items():
        blocks.setdefault(block, {})[family] = count
    return replace(quant, blocks=blocks)


def measure(gradient: Gradient, families: tuple[str, ...]) -> Costs:
    """Measures bytes a bit, and error, of each of these families in each block that has it."""
    costs, config, blocks = Costs(), gradient.config, gradient.attached.backbone.blocks
    batch = config.optim.micro_batch or config.optim.batch_size
    with Progress("measuring what codes cost", len(blocks) * len(families), " codes") as progress:
        for index, block in enumerate(blocks):
            for family in families:
                if family == "input":
                    per_image = math.prod(block.input.shape) / 8
                else:
                    per_image = (_kept(gradient, index, family, 8) - _kept(gradient, index, family, 4)) / 4
                if per_image:
                    costs.bytes[index, family] = batch * per_image
                    coded = replace(gradient.base, blocks={index: _alone(family, REFERENCE_BITS)})
                    costs.error[index, family] = gradient.error(coded)
                progress.add(1)
    return costs


def _kept(gradient: Gradient, block: int, family: str, bits: int) -> int:
    return gradient.kept(replace(gradient.base, recompute="none", blocks={block: _alone(family, bits)}))


def _alone(family: str, bits: int) -> dict[str, int]:
    """Returns the settings of a block in which this family alone is coded.

    A map is no kept operand where attention is not coded.
    """
    return {"attention": 8, family: bits} if family == "softmax" else {family: bits}
