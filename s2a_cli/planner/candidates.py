"""Says what a plan chooses between: how many images run at a time, and what the first blocks keep.

A candidate is stock PyTorch but for its micro-batch and its first blocks, which all keep less in one way, its mode. The
first ones, because their activations are made first and needed last: when they are computed again, those of all other
blocks are gone. Any number of blocks can be in the mode, so that a plan gives up no more speed than it has to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from s2a_cli.activations import REFERENCE
from s2a_cli.config.overrides import CONF
from s2a_cli.config.rules import show
from s2a_cli.config.schema import QuantConfig
from s2a_cli.config.settings import plain

EXACT = 1.0
FIDELITY = {"exact": EXACT, "0.999": 0.999, "0.99": 0.99}  # least cosine of the gradient with the exact one


@dataclass(frozen=True)
class Mode:
    """A way in which a block keeps less.

    settings: of QuantConfig, where they differ from stock PyTorch. fidelity: the highest level of FIDELITY at which it
    is looked at; whether it keeps it is measured. recomputes: it needs blocks, which run again.
    """

    name: str  # of the preset whose settings it has, or `none`
    about: str
    settings: tuple[tuple[str, Any], ...] = ()
    fidelity: float = EXACT

    @property
    def recomputes(self) -> bool:
        return ("recompute", "block") in self.settings

    @property
    def cuts(self) -> bool:
        """Whether it asks for a number of chunks of the batch, which changes nothing for a single image."""
        return dict(self.settings).get("chunks") is not None


def _preset(name: str, about: str, fidelity: float) -> Mode:
    """Returns the mode of an option of `quant=`."""
    own = cast(DictConfig, OmegaConf.load(CONF / "quant" / f"{name}.yaml"))
    settings = {"lossless": True} | {str(key): value for key, value in own.items() if key != "name"}
    return Mode(name, about, tuple(settings.items()), fidelity)


PLAIN = Mode("none", "stock PyTorch")
RECOMPUTED = Mode("none", "blocks recomputed", (("recompute", "block"), ("chunks", None)))
MODES = (
    PLAIN,
    _preset("exact", "lossless savings", EXACT),
    RECOMPUTED,
    Mode("none", "blocks recomputed in 8 chunks", (("recompute", "block"), ("chunks", 8))),
    _preset("int8", "8-bit codes", 0.999),
    _preset("int5", "5-bit codes", 0.999),
    _preset("tiny", "blocks recomputed from 8-bit inputs", 0.999),
    _preset("int4", "4-bit codes", 0.99),
)
# How frozen weights are stored, and the level at which that is looked at, as Mode.fidelity.
WEIGHTS = {"fp32": EXACT, "offload": EXACT, "bf16": 0.999, "int8": 0.999, "nf4": 0.99}


@dataclass(frozen=True)
class Candidate:
    """States one choice. total: blocks of the backbone; without any, 1 stands for the whole model."""

    micro_batch: int
    mode: Mode = PLAIN
    blocks: int = 0  # the first so many are in the mode
    total: int = 1
    weights: str | None = None  # of backbone.weights; None leaves them as they are

    @property
    def fidelity(self) -> float:
        """The level that it is looked at for."""
        coded = self.mode.fidelity if self.blocks else EXACT
        return min(coded, WEIGHTS.get(self.weights or "fp32", EXACT))

    @property
    def quant(self) -> QuantConfig:
        """Returns the settings of what is kept."""
        own = dict(self.mode.settings)
        if not self.blocks or not own:
            return REFERENCE
        if self.blocks == self.total:
            return QuantConfig(name=self.mode.name, **{"lossless": False, **own})
        return replace(REFERENCE, name=self.mode.name, blocks=dict.fromkeys(range(self.blocks), own))

    def settings(self, batch: int) -> dict[str, Any]:
        """Returns {dotted key: value} of all that is chosen, for so many images a step."""
        chosen: dict[str, Any] = {"quant": plain(OmegaConf.structured(self.quant))}
        chosen["optim.micro_batch"] = self.micro_batch if self.micro_batch < batch else None
        return chosen if self.weights is None else chosen | {"backbone.weights": self.weights}

    def words(self, batch: int) -> list[str]:
        """Returns the words of `s2a train` that ask for the same."""
        return list(self._words(batch))

    def _words(self, batch: int) -> Iterator[str]:
        quant, own = self.quant, dict(self.mode.settings)
        whole = self.blocks == self.total
        yield f"quant={quant.name if whole or quant == REFERENCE else 'none'}"
        if quant.name == "none" and whole:
            yield from (f"quant.{key}={show(value)}" for key, value in own.items())
        if quant.blocks:
            if quant.name != "none":
                yield f"quant.name={quant.name}"
            yield f"quant.blocks={show(quant.blocks)}"
        if self.micro_batch < batch:
            yield f"optim.micro_batch={self.micro_batch}"
        if self.weights is not None:
            yield f"backbone.weights={self.weights}"

    def describe(self, batch: int) -> str:
        """Returns the choice in words: `micro-batches of 8, blocks recomputed (7 of 12)`."""
        said = [f"micro-batches of {self.micro_batch}" if self.micro_batch < batch else "the whole batch"]
        if self.blocks:
            said.append(self.mode.about + (f" ({self.blocks} of {self.total})" if self.blocks < self.total else ""))
        elif self.mode == PLAIN:
            said.append(self.mode.about)
        if self.weights not in (None, "fp32"):
            said.append(f"{self.weights} weights")
        return ", ".join(said)


def micro_batches(batch: int) -> list[int]:
    """Returns sizes that cut a batch into 1, 2, 3, 4, 6, 8, 12, 16, ... micro-batches of almost the same size."""
    counts = sorted({count for power in range(batch.bit_length()) for count in (2**power, 3 * 2**power)} | {batch})
    return sorted({-(-batch // count) for count in counts if count <= batch})
