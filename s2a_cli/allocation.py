"""quant=auto: the settings of each block with the least error in the gradient whose predicted peak fits a budget.

In the order of speed, the first of these that fits is taken:

1. stock PyTorch, then the lossless savings alone;
2. codes: bits for each block and family of operators, if the gradient's expected error stays below `TOLERANCE`;
3. blocks computed again from inputs of 8 bits, in more and more pieces; then from fewer bits, block by block.

How much a code costs is measured on images of the run (the S2A paper's "gradient-informed precision allocation"): the
relative error e of the whole gradient when one family of one block alone is coded in `REFERENCE` bits. Each further bit
halves it, and errors of different operators are independent: the expected square error of an allocation is the sum of
e^2 4^(REFERENCE - bits). It is convex in the bits, so that giving bits one by one to whoever gains most for its bytes
is optimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from s2a_cli import memory
from s2a_cli.activations import STOCK
from s2a_cli.backbones import Backbone
from s2a_cli.config import QuantConfig
from s2a_cli.errors import UserError
from s2a_cli.progress import Progress
from s2a_cli.steps import Step, train_mode

TOLERANCE = 0.045  # relative error of the gradient: a cosine of 0.999
REFERENCE = 4
BITS = (2, 3, 4, 5, 6, 8)
INPUT_BITS = (4, 5, 6, 8)
CODED = ("pointwise", "norm", "attention", "softmax")  # families of operators
PIECES = (1, 8)  # of the batch, for coded blocks
FINER = (4, 8, 16)  # for recomputed ones
ROUNDS = 4  # of predicting an allocation and correcting what it may keep

Peak = Callable[[QuantConfig], float]  # predicted, MiB
Key = tuple[int, str]  # the number of a block, and a family or "input"


@dataclass
class Costs:
    """What one bit of a family in a block costs in bytes, and how much error `REFERENCE` bits make."""

    bytes: dict[Key, float] = field(default_factory=dict)
    error: dict[Key, float] = field(default_factory=dict)  # relative, of the whole gradient

    def expected(self, bits: dict[Key, int]) -> float:
        """The relative error of the gradient under an allocation."""
        return math.sqrt(sum(self._square(key, count) for key, count in bits.items()))

    def _square(self, key: Key, bits: int) -> float:
        return self.error[key] ** 2 * 4.0 ** (REFERENCE - bits)

    def spread(self, mib: float, choices: tuple[int, ...]) -> dict[Key, int] | None:
        """The bits with the least expected error that take at most `mib`; None where the fewest take more."""
        bits = dict.fromkeys(self.bytes, choices[0])
        left = mib * memory.MIB - sum(self.bytes.values()) * choices[0]
        if left < 0:
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
    error: float  # of the gradient, expected

    def describe(self) -> str:
        """One line for people."""
        quant, words = self.quant, []
        if quant.recompute == "block":
            words.append("blocks recomputed from inputs of " + _span(b["input"] for b in quant.blocks.values()))
        for family in CODED:
            bits = [block[family] for block in quant.blocks.values() if block.get(family)]
            words += [f"{family} {_span(bits)}"] if bits else []
        if not words:
            words.append("lossless savings" if quant.lossless else "stock PyTorch")
        if quant.chunks > 1:
            words.append(f"{quant.chunks} pieces of the batch")
        error = f"expected relative error of the gradient {self.error:.3f}" if self.error else "the gradient is exact"
        return f"quant=auto: {', '.join(words)}: predicted peak {self.peak_mib:,.0f} of {quant.budget_mib:g} MiB, {error}"


def _span(bits: Iterable[int]) -> str:
    low, high = min(bits := list(bits)), max(bits)
    return f"{low} bits" if low == high else f"{low} to {high} bits"


def allocate(
    config: DictConfig, backbone: Backbone, peak: Peak, batch: tuple[Tensor, Tensor], device: torch.device
) -> Choice:
    """The choice for a run. Raises UserError where nothing fits; the message has the smallest peak there is.

    config: with quant.budget_mib. peak: predicts the step of this run with other quant settings. batch: some training
    images and targets, on which the costs are measured.
    """
    asked = OmegaConf.to_object(config.quant)
    for quant in (replace(asked, lossless=False), asked):
        if (found := peak(quant)) <= asked.budget_mib:
            return Choice(quant, found, 0.0)
    costs = measure(config, backbone, batch, device, CODED, BITS)
    for chunks in PIECES if costs.bytes else ():
        choice = _fit(replace(asked, chunks=chunks), costs, BITS, peak)
        if choice and choice.error <= TOLERANCE:
            return choice
    # What is coded outside of blocks, such as the last normalisation, takes little in 8 bits.
    asked = replace(asked, recompute="block", norm=8)
    inputs = measure(config, backbone, batch, device, ("input",), INPUT_BITS)
    for chunks in FINER:
        choice = _fit(replace(asked, chunks=chunks), inputs, INPUT_BITS, peak)
        if choice and choice.error <= TOLERANCE:
            return choice
    if choice:
        return choice
    smallest = peak(_applied(replace(asked, chunks=FINER[-1]), dict.fromkeys(inputs.bytes, INPUT_BITS[0])))
    raise UserError(
        f"quant.budget_mib={asked.budget_mib:g}: nothing fits; the smallest predicted peak of this run is {smallest:,.0f} MiB"
    )


def _fit(quant: QuantConfig, costs: Costs, choices: tuple[int, ...], peak: Peak) -> Choice | None:
    """The bits with the least error whose predicted peak fits; None where even the fewest do not."""
    most = dict.fromkeys(costs.bytes, choices[-1])
    allowed = sum(costs.bytes[key] * bits for key, bits in most.items()) / memory.MIB
    for _ in range(ROUNDS):
        bits = costs.spread(allowed, choices)
        if bits is None:
            return None
        applied = _applied(quant, bits)
        found = peak(applied)
        if found <= quant.budget_mib:
            return Choice(applied, found, costs.expected(bits))
        allowed = sum(costs.bytes[key] * count for key, count in bits.items()) / memory.MIB - (found - quant.budget_mib)
    return None


def _applied(quant: QuantConfig, bits: dict[Key, int]) -> QuantConfig:
    blocks: dict[int, dict[str, int]] = {}
    for (block, family), count in bits.items():
        blocks.setdefault(block, {})[family] = count
    return replace(quant, blocks=blocks)


def measure(
    config: DictConfig,
    backbone: Backbone,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    families: tuple[str, ...],
    choices: tuple[int, ...],
) -> Costs:
    """Bytes a bit and error of each family in each block that has it."""
    costs = Costs(bytes=_bytes(config, backbone, batch[0], families, device))
    train_mode(backbone.model)
    base = replace(STOCK, recompute="block", group=config.quant.group)
    exact = _gradient(config, backbone, batch, device, base)
    with Progress("measuring the gradient's sensitivity", len(costs.bytes), " codes") as progress:
        for block, family in costs.bytes:
            quant = replace(base, blocks={block: _alone(family, REFERENCE)})
            error = torch.linalg.vector_norm(_gradient(config, backbone, batch, device, quant) - exact)
            costs.error[block, family] = (error / torch.linalg.vector_norm(exact)).item()
            progress.add(1)
    return costs


def _alone(family: str, bits: int) -> dict[str, int]:
    """The settings of a block in which this family alone is coded; a map is no kept operand where attention is not coded."""
    return {"attention": 8, family: bits} if family == "softmax" else {family: bits}


def _gradient(
    config: DictConfig, backbone: Backbone, batch: tuple[Tensor, Tensor], device: torch.device, quant: QuantConfig
) -> Tensor:
    """The gradient of all that trains, as one vector, under the same random numbers each time."""
    step = Step(OmegaConf.merge(config, {"quant": OmegaConf.structured(quant)}), device, backbone.block_modules)
    images, targets = (tensor.to(device) for tensor in batch)
    torch.manual_seed(config.seed)
    trained = [p for p in backbone.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(step.criterion(step.logits(backbone.model, images), targets), trained, allow_unused=True)
    return torch.cat([g.flatten().double() for g in found if g is not None])


def _bytes(
    config: DictConfig, backbone: Backbone, images: Tensor, families: tuple[str, ...], device: torch.device
) -> dict[Key, float]:
    """Bytes that one more bit of a family takes in a block, for a batch; nothing where the block has no such operator."""
    batch = config.optim.micro_batch or config.optim.batch_size
    if families == ("input",):
        return {(index, "input"): batch * math.prod(block.input.shape) / 8 for index, block in enumerate(backbone.blocks)}

    def kept(block: int, family: str, bits: int) -> int:
        quant = replace(STOCK, group=config.quant.group, blocks={block: _alone(family, bits)})
        step = Step(OmegaConf.merge(config, {"quant": OmegaConf.structured(quant)}), device, backbone.block_modules)
        return memory.saved_bytes(lambda: step.logits(backbone.model, images[:1].to(device)), backbone.model)

    found = {}
    for block in range(len(backbone.blocks)):
        for family in families:
            if per_image := (kept(block, family, 8) - kept(block, family, 4)) / 4:
                found[block, family] = batch * per_image
    return found
