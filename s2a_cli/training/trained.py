"""Loads a finished run: its model with what was trained, its preprocessing and its class names, ready to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from s2a_cli.common.arguments import check_type
from s2a_cli.config.compose import recompose
from s2a_cli.data import Transform, build_transform
from s2a_cli.methods import Attachment
from s2a_cli.results import record
from s2a_cli.training import checkpoints
from s2a_cli.training.run import build, choose_device
from s2a_cli.training.step import Step


@dataclass
class Trained:
    """A finished run's model in evaluation, with all that it takes to use it.

    Call it with images [B, 3, H, W] that `transform` made of RGB PIL images: it returns their logits [B, classes] in
    fp32, on its device, as the run's own test computes them.
    """

    folder: Path
    config: DictConfig
    record: record.Result
    attached: Attachment
    device: torch.device
    transform: Transform
    _step: Step = field(repr=False)

    @property
    def classes(self) -> list[str]:
        """The names of the classes; a logit's place is its class's."""
        return self.record["data"]["classes"]

    @property
    def multi_label(self) -> bool:
        """Whether it gives an image several labels, or none: the sigmoid of each logit is then a probability."""
        return self.record["data"]["multi_label"]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns how probable each class is, [B, classes]; with several labels an image, each for itself."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    @property
    def model(self) -> nn.Module:
        return self.attached.model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self.model.eval()
        return self._step.evaluated(self.model, images.to(self.device, non_blocking=self.device.type == "cuda"))


def load(run: Path | str, overrides: Sequence[str] = ()) -> Trained:
    """Loads the run in a folder, without its data.

    overrides: words of the command line that change where it runs, such as "device=cpu", or where the weights of its
    backbone lie. Raises UserError for a folder without a run and for one whose tensors are damaged or were trained on
    other weights.
    """
    check_type("run", run, (str, Path), "the folder of a run")
    check_type("overrides", overrides, (list, tuple), "a list of words, such as ['device=cpu']")
    stored = record.read_result(Path(run))["config"]
    return load_as(Path(run), recompose(stored, list(overrides)))


def load_as(folder: Path, config: DictConfig) -> Trained:
    """Does what `load` does, for a config that is composed already."""
    result, device = record.read_result(folder), choose_device(config.device)
    with torch.random.fork_rng(devices=[]):
        attached, weights = build(config, len(result["data"]["classes"]))
    checkpoints.load(folder, attached.model, weights)
    attached.model.to(device).eval()
    transform = build_transform(attached.backbone.image, config.dataset, train=False)
    return Trained(folder, config, result, attached, device, transform, Step(config, device, attached))
