"""Predicts the memory of whole compositions of backbone, method, quant and optimiser, without weights or images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.config.settings import merge, plain
from s2a_cli.data.columns import count_classes
from s2a_cli.data.layout import class_folders
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.margin import Margin
from s2a_cli.methods import Attachment
from s2a_cli.planner.task import Task
from s2a_cli.training import forecast
from s2a_cli.training.run import attach
from s2a_cli.training.step import moving_norms, train_mode

CLASSES, IMAGES = 100, 1 << 20  # assumed of a data set that is not on this machine
SIZES = {  # classes, training images before a validation split is taken, and whether there is an official one
    "cifar10": (10, 50_000, False),
    "cifar100": (100, 50_000, False),
    "digits": (10, 1_438, False),
    "flowers102": (102, 1_020, True),
    "pets": (37, 3_680, False),
}
DOMAINNET = {
    "clipart": 33_525,
    "infograph": 36_023,
    "painting": 50_416,
    "quickdraw": 120_750,
    "real": 120_906,
    "sketch": 48_212,
}


@dataclass(frozen=True)
class Composition:
    """What decides the memory of a run: its config and the sizes of its data."""

    config: DictConfig
    classes: int
    images: int  # to train on: a batch has no more
    assumed: str | None  # what is not known of the data

    @classmethod
    def of(cls, config: DictConfig) -> Composition:
        """Returns the composition of a config."""
        return cls(config, *sizes(config.dataset))

    @property
    def batch(self) -> int:
        """The images of an optimiser step."""
        return min(self.config.optim.batch_size, self.images)

    @property
    def title(self) -> str:
        """The choices of the composition on one line."""
        config = self.config
        names = [config.backbone.name, config.method.name, f"quant {config.quant.name}"]
        names += [config.precision, config.optim.name]
        weights = [f"{config.backbone.weights} weights"] if config.backbone.weights != "fp32" else []
        micro = [f"micro-batches of {config.optim.micro_batch}"] if config.optim.micro_batch else []
        return " · ".join([*names, *weights, f"batch {self.batch}", *micro])


class Predictor:
    """Predicts compositions, and full fine-tuning of each backbone once. processes: that share a batch."""

    def __init__(self, processes: int = 1):
        self.processes = processes
        self._full: dict[str, Profile] = {}
        self._built: dict[str, Attachment] = {}  # used again for other batch sizes

    def __call__(self, composition: Composition) -> Profile:
        """Returns the profile of a composition's step.

        Raises UserError for one that can't be predicted, and for settings that don't fit.
        """
        config = composition.config
        if config.compile:
            raise UserError(
                "compile=true can't be predicted: the compiler decides what it keeps; predict the run without it"
            )
        return self._profile(self._attached(composition), config, composition)

    def fewest(self, composition: Composition) -> int:
        """Returns the images that a batch needs at least: one for each process, two where it can't train with one."""
        attached = self._attached(composition)
        alone = moving_norms(attached.model) and backbones.lacks_variance(attached.backbone, train_mode)
        return self.processes * (2 if alone else 1)

    def task(self, composition: Composition, available: float, margin: Margin | None) -> Task:
        """Returns a composition as what is planned: for so many bytes of a device."""
        attached, config = self._attached(composition), composition.config
        return Task(config, attached, composition.classes, composition.images, available, margin, self.processes)

    def _attached(self, composition: Composition) -> Attachment:
        """Returns the composition's structures attached to its backbone, without weights."""
        config = composition.config
        key = json.dumps([plain(with_batch_size(config, 1), resolve=True), composition.classes])
        if key not in self._built:
            backbone = backbones.build(config.backbone, composition.classes, meta=True)
            self._built[key] = attach(config, backbone)
        return self._built[key]

    def full(self, composition: Composition) -> Profile:
        """Returns the profile of the same composition under full fine-tuning, with PyTorch's own activations."""
        config = composition.config
        settings = plain(config, resolve=True)
        chosen = {name: settings[name] for name in ("backbone", "optim", "precision")}
        key = json.dumps([chosen, composition.classes, composition.images])
        if key not in self._full:
            attached, changed = forecast.full_finetuning(config, composition.classes)
            self._full[key] = self._profile(attached, changed, composition)
        return self._full[key]

    def _profile(self, attached: Attachment, config: DictConfig, composition: Composition) -> Profile:
        """Returns the profile of a step. Raises UserError for one that can't be predicted."""
        if composition.batch < self.processes:
            raise UserError(f"a batch of {composition.batch} images can't be shared by {self.processes} processes")
        return forecast.profile_or_refuse(attached, config, composition.images, self.processes)


def sizes(dataset: DatasetConfig) -> tuple[int, int, str | None]:
    """Returns (classes, training images, what is assumed) of a data set; nothing is read but names of folders."""
    assumed = None
    if dataset.name == "domainnet" and dataset.domain:
        classes, images, has_val = 345, DOMAINNET[dataset.domain], False
    elif dataset.name in SIZES:
        classes, images, has_val = SIZES[dataset.name]
    else:
        classes, images, has_val = _class_folders(dataset), IMAGES, True
        if not classes:
            classes = CLASSES
            key = "file is not" if dataset.name == "table" else "root is not a folder"
            assumed = f"{CLASSES} classes and at least a batch of images are assumed: dataset.{key} here"
    if not has_val:
        images = round(images * (1 - dataset.val_fraction))
    if dataset.shots is not None:
        images = min(images, dataset.shots * classes)
    if dataset.fraction is not None:
        images = max(1, round(images * dataset.fraction))
    return classes, images, assumed


def with_batch_size(config: DictConfig, images: int) -> DictConfig:
    """Returns a config with another batch size."""
    return merge(config, {"optim": {"batch_size": images}})


def _class_folders(dataset: DatasetConfig) -> int:
    """Returns how many classes the folders or the table of a data set name; 0 where they are not on this machine."""
    if dataset.name == "table":
        return count_classes(Path(dataset.file).expanduser(), dataset) if dataset.file else 0
    root = Path(dataset.root or "").expanduser()
    if not dataset.root or not root.is_dir():
        return 0
    by_domain = dataset.layout == "domains" or dataset.domain or dataset.test_domain
    return class_folders(root, "domains" if by_domain else dataset.layout)
