"""The memory of whole compositions: backbone, method, quant, optimiser, precision; without their weights or images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import type_and_first_line
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.layout import class_folders
from s2a_cli.memory.breakdown import Profile
from s2a_cli.methods import Attachment
from s2a_cli.training import forecast
from s2a_cli.training import run as run_module

CLASSES, IMAGES = 100, 1 << 20  # assumed of a data set that is not at hand
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
    """A run as far as its memory goes."""

    config: DictConfig
    classes: int
    images: int  # to train on: a batch has no more
    assumed: str | None  # what is not known of the data

    @classmethod
    def of(cls, config: DictConfig) -> Composition:
        return cls(config, *sizes(config.dataset))

    @property
    def batch(self) -> int:
        return min(self.config.optim.batch_size, self.images)

    @property
    def title(self) -> str:
        config = self.config
        names = [
            config.backbone.name,
            config.method.name,
            f"quant {config.quant.name}",
            config.precision,
            config.optim.name,
        ]
        weights = [f"{config.backbone.weights} weights"] if config.backbone.weights != "fp32" else []
        micro = [f"micro-batches of {config.optim.micro_batch}"] if config.optim.micro_batch else []
        return " · ".join([*names, *weights, f"batch {self.batch}", *micro])


class Predictor:
    """Predicts compositions; full fine-tuning of the same backbone only once. processes: that share a batch."""

    def __init__(self, processes: int = 1):
        self.processes = processes
        self._full: dict[str, Profile] = {}
        self._built: dict[str, Attachment] = {}  # for other batch sizes

    def __call__(self, composition: Composition) -> Profile:
        """The step of a composition.

        Raises UserError for one that can't be predicted, and for settings that don't fit.
        """
        config = composition.config
        if config.compile:
            raise UserError(
                "compile=true can't be predicted: the compiler decides what it keeps; predict the run without it"
            )
        if config.quant.budget_mib:
            budget = f"{config.quant.budget_mib:g}"
            raise UserError(
                f"quant=auto can't be predicted: it chooses on images of the run, for a peak of at most {budget} MiB"
            )
        key = json.dumps(
            [
                OmegaConf.to_container(OmegaConf.merge(config, {"optim": {"batch_size": 1}}), resolve=True),
                composition.classes,
            ]
        )
        if key not in self._built:
            backbone = backbones.build(config.backbone, composition.classes, meta=True)
            self._built[key] = run_module.attach(config, backbone)
        return self._profile(self._built[key], config, composition)

    def full(self, composition: Composition) -> Profile:
        """The same composition under full fine-tuning, with stock PyTorch."""
        config = composition.config
        plain = OmegaConf.to_container(config, resolve=True)
        key = json.dumps(
            [
                {name: plain[name] for name in ("backbone", "optim", "precision")},
                composition.classes,
                composition.images,
            ]
        )
        if key not in self._full:
            attached, changed = forecast.full_finetuning(config, composition.classes)
            self._full[key] = self._profile(attached, changed, composition)
        return self._full[key]

    def _profile(self, attached: Attachment, config: DictConfig, composition: Composition) -> Profile:
        if composition.batch < self.processes:
            raise UserError(f"a batch of {composition.batch} images can't be shared by {self.processes} processes")
        try:
            return forecast.profile_step(attached, config, composition.images, self.processes)
        except UserError:
            raise
        except Exception as error:  # a model of timm whose forward pass reads values can't run without data
            first = type_and_first_line(error)
            if "allocate memory" in first:
                first += "; this system gives no address space beyond its memory: see vm.overcommit_memory"
            raise UserError(f"{config.backbone.timm} can't be predicted: {first}") from error


def sizes(dataset: DatasetConfig) -> tuple[int, int, str | None]:
    """(classes, training images, what is assumed) of a data set, from what is known of it: nothing is read but folder
    names.
    """
    assumed = None
    if dataset.name == "domainnet" and dataset.domain:
        classes, images, has_val = 345, DOMAINNET[dataset.domain], False
    elif dataset.name in SIZES:
        classes, images, has_val = SIZES[dataset.name]
    else:
        classes, images, has_val = _class_folders(dataset), IMAGES, True
        if not classes:
            classes, assumed = (
                CLASSES,
                f"{CLASSES} classes and at least a batch of images are assumed: dataset.root is not a folder here",
            )
    if not has_val:
        images = round(images * (1 - dataset.val_fraction))
    if dataset.shots is not None:
        images = min(images, dataset.shots * classes)
    if dataset.fraction is not None:
        images = max(1, round(images * dataset.fraction))
    return classes, images, assumed


def _class_folders(dataset: DatasetConfig) -> int:
    root = Path(dataset.root or "").expanduser()
    if not dataset.root or not root.is_dir():
        return 0
    return class_folders(root, dataset.layout)
