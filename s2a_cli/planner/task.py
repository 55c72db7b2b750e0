"""States what is planned, and predicts what each candidate needs of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.config.rules import show
from s2a_cli.config.settings import replaced
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.margin import Margin
from s2a_cli.methods import Attachment
from s2a_cli.planner.candidates import MODES, PLAIN, WEIGHTS, Candidate, Mode, micro_batches
from s2a_cli.planner.search import Room
from s2a_cli.training import forecast
from s2a_cli.training.run import attach
from s2a_cli.training.step import moving_norms


@dataclass
class Task:
    """What is planned: the step of a config, without its data or weights.

    attached: to a backbone on any device. images: to train on. available: bytes that a step may take. margin: what the
    device needs beyond the peak; None for a CPU. cuda_graphs: whether passes can be replayed as CUDA graphs.
    dtype: of a batch on the device; None for what a run has there. run_images: that a process trains on in all epochs;
    infinite where it is not known for how long. chosen: {dotted key: value} that was chosen before, and is in `config`.
    """

    config: DictConfig
    attached: Attachment
    classes: int
    images: int
    available: float
    margin: Margin | None = None
    processes: int = 1
    cuda_graphs: bool = False
    dtype: torch.dtype | None = None
    run_images: float = math.inf
    chosen: dict[str, Any] = field(default_factory=dict)
    _stored: dict[str, Attachment] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """The images of a step in each process."""
        return -(-min(self.config.optim.batch_size, self.images) // self.processes)

    @property
    def whole(self) -> bool:
        """Whether a batch and its blocks must not be cut: BatchNorms that train see all of it."""
        return bool(moving_norms(self.attached.model))

    @property
    def total(self) -> int:
        """The blocks of the backbone, at least 1."""
        return max(1, len(self.attached.blocks))

    @property
    def runs_blocks(self) -> bool:
        """Whether blocks run in a step; where features of all of them are kept, none do."""
        running = self.attached.running_blocks(bool(self.config.dataset.cache))
        return bool(running) or not self.attached.blocks

    def modes(self, fidelity: float) -> list[Mode]:
        """Returns the modes that can be tried, down to a level of fidelity."""
        if not self.runs_blocks:
            return [PLAIN]
        found = [mode for mode in MODES if mode.fidelity >= fidelity]
        if self.whole:
            return [mode for mode in found if mode.name in ("none", "exact") and not mode.recomputes]
        return found if self.attached.blocks else [mode for mode in found if not mode.recomputes]

    def weights(self, fidelity: float) -> tuple[str | None, ...]:
        """Returns the ways to store frozen weights that can be tried: one, unless the config leaves it open."""
        if self.config.backbone.weights != "auto":
            return (None,)
        return tuple(name for name, level in WEIGHTS.items() if level >= fidelity and self.stored(name))

    def stored(self, weights: str | None) -> Attachment | None:
        """Returns the attachment with its weights stored so, for predictions; None where no weight can be."""
        if weights in (None, "fp32"):
            return self.attached
        if weights not in self._stored:
            config = replaced(self.config, {"backbone.weights": weights})
            try:
                self._stored[weights] = attach(config, backbones.build(config.backbone, self.classes, meta=True))
            except UserError:
                return None
        return self._stored[weights]

    def room(self, like: str | None = None, doubt: float = math.inf) -> Room:
        """Returns what tells which candidates fit; like and doubt are Room's."""
        sizes = [self.batch] if self.whole else micro_batches(self.batch)
        idle = len(self.attached.blocks) - len(self.attached.passed_blocks())
        return Room(self.needed, self.available, sizes, self.total, like, doubt, min(idle, self.total - 1))

    def needed(self, candidate: Candidate) -> float:
        """Returns the bytes of the device that a candidate is predicted to need; infinity for one that can't be run.

        Raises NotPredicted, a UserError, where nothing can be predicted.
        """
        attached = self.stored(candidate.weights)
        config = replaced(self.config, self.settings(candidate))
        if attached is None:
            return math.inf
        try:
            profile = forecast.profile_or_refuse(attached, config, self.images, self.processes, self.dtype)
        except forecast.NotPredicted:
            raise
        except UserError:
            return math.inf
        return self.takes(profile)

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        """Returns {dotted key: value} of all that is chosen with a candidate."""
        return candidate.settings(self.batch) | {"cuda_graphs": self.graphs(candidate.weights)} | self.chosen

    def words(self, candidate: Candidate) -> list[str]:
        """Returns the words of `s2a train` that ask for the same."""
        graphs = {"cuda_graphs": True} if self.graphs(candidate.weights) else {}
        others = [f"{key}={show(value)}" for key, value in (graphs | self.chosen).items()]
        return [*candidate.words(self.batch), *others]

    def timed(self, weights: str | None = None) -> DictConfig:
        """Returns the config with which candidates are timed whose weights are stored so; None leaves them."""
        stored = {} if weights is None else {"backbone.weights": weights}
        return replaced(self.config, stored | {"cuda_graphs": self.graphs(weights)})

    def graphs(self, weights: str | None) -> bool:
        """Returns whether passes are replayed as CUDA graphs; offloaded weights come from the host."""
        return self.cuda_graphs and weights != "offload"

    def takes(self, profile: Profile) -> float:
        """Returns the bytes of the device that a step takes."""
        return self.margin.needed(profile) if self.margin else profile.peak_bytes

    def smallest(self, fidelity: float) -> list[Candidate]:
        """Returns the candidates of the fewest images at a time that keep the least, each mode once."""
        size, modes = self.room().sizes[0], self.modes(fidelity)
        return [
            Candidate(size, mode, 0 if mode == PLAIN else self.total, self.total, weights)
            for weights in self.weights(fidelity)
            for mode in modes
        ]
