"""Chooses a first config for somebody's photos, to suit them and this machine: what `s2a init` writes."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from s2a_cli import data
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import duration
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import value_text
from s2a_cli.config.schema import RunConfig
from s2a_cli.data.images import FORMATS, ImageFiles
from s2a_cli.memory.result import MIB
from s2a_cli.planner.batch_size import largest_batch
from s2a_cli.training import duration as durations
from s2a_cli.training import forecast
from s2a_cli.training.run import prepare

SMALL = "backbone.image_size=112"
CHOICES = (["backbone=vit_b"], ["backbone=vit_s"], ["backbone=vit_t"], ["backbone=vit_t", SMALL])  # accurate to fast
STEPS = 400  # of the optimiser, about; of few photos no more than EPOCHS allow
EPOCHS = (10, 40)
FEWEST = 5  # epochs, where even the fastest choice takes too long
BATCH = 64
GROUPS = ("dataset", "backbone", "method", "quant", "optim", *(field.name for field in fields(RunConfig)))  # in a file
WIDE = 44  # characters of a line before its comment, where it can be
SHARE = 0.9  # of the free memory that a budget takes
LOOKED_AT = 200  # photos whose size is read, about
Settings = dict[str, tuple[str, str]]  # key: (value as on the command line, why)


@dataclass(frozen=True)
class Start:
    """A config for somebody's photos, and what was found: lines of text."""

    settings: Settings
    found: list[str]
    proposed: str = ""  # a last line of the file that is commented out

    @property
    def words(self) -> list[str]:
        """The config as words of the command line."""
        return [f"{key}={value}" for key, (value, _) in self.settings.items()]

    def text(self, path: Path) -> str:
        """Returns the file of the config: `key: value` with a comment each."""
        ordered = sorted(self.settings.items(), key=lambda item: GROUPS.index(item[0].lstrip("+").split(".")[0]))
        lines = [(f"{key}: {value}", why) for key, (value, why) in ordered]
        width = max(len(line) for line, _ in lines if len(line) <= WIDE)
        commented = [f"{line:<{width}}  # {why}" if why else line for line, why in lines]
        head = [f"# s2a train {shlex.quote(f'config={path}')}", *(f"# {line}" for line in self.found), ""]
        last = [f"# {self.proposed}"] if self.proposed else []
        return "\n".join([*head, *commented, *last]) + "\n"


def start(folder: str, words: list[str], minutes: float) -> Start:
    """Looks at the photos in a folder, and chooses a backbone, image size, epochs and what memory allows.

    words: settings that stay as they are. minutes: what a training may take on a CPU. Raises UserError as a training
    would.
    """
    given = dict(word.split("=", 1) for word in words)
    root = f"dataset.root={value_text(folder)}"
    splits = data.load(compose(["dataset=folder", root, *words]).dataset)
    sides = _shorter_sides(splits)
    found = [
        f"{len(splits.train):,} photos to train on, {len(splits.val):,} to validate, {len(splits.test):,} to test, of"
        f" {len(splits.classes)} classes; shorter sides of {min(sides):,} to {max(sides):,} px, median"
        f" {round(median(sides)):,}"
    ]
    epochs = min(EPOCHS[1], max(EPOCHS[0], STEPS // max(1, len(splits.train) // BATCH)))
    settings: Settings = {
        "dataset": ("folder", ""),
        "dataset.root": (value_text(folder), "a folder a class, or train/ and test/"),
        "method": ("s2a", "biases, low-rank prompts, a side branch; `s2a ls methods` lists others"),
        "optim.epochs": (str(epochs), "passes over the photos to train on"),
        "optim.batch_size": (str(BATCH), "photos a step; less takes less memory"),
    }
    on_gpu = torch.cuda.is_available() and given.get("device", "auto") != "cpu"
    if on_gpu:
        settings |= {"backbone": ("vit_b", "ViT-B/16"), "precision": ("amp-bf16", "faster, and less memory")}
    elif "budget" not in given:  # which chooses it
        settings["quant"] = ("none", "no codes of activations: they take time, and a CPU has memory")
    settings |= {key: (value, "as you said") for key, value in given.items()}
    if on_gpu:
        return _fitted(Start(settings, found), splits, given)
    return _timed(Start(settings, found), splits, given, round(median(sides)), 60 * minutes)


def _shorter_sides(splits: data.Splits) -> list[int]:
    """Returns the pixels of the shorter side of some of the photos, read from their headers."""
    sides = []
    for images in (splits.train, splits.val, splits.test):
        assert isinstance(images, ImageFiles), "dataset=folder reads files"
        for file in images.files[:: max(1, 3 * len(images) // LOOKED_AT)]:
            with Image.open(images.root / file, formats=FORMATS) as image:
                sides.append(min(image.size))
    return sides


def _fitted(begun: Start, splits: data.Splits, given: dict[str, str]) -> Start:
    """Returns a start that fits the memory of the GPU, and says how much it is predicted to take.

    A budget makes it fit; where what was given goes without one, a smaller batch.
    """
    (free, total), settings = torch.cuda.mem_get_info(0), begun.settings
    if "backbone.image_size" not in given:
        side = durations.image_size(compose(begun.words).backbone, len(splits.classes))
        settings["backbone.image_size"] = (str(side), "pixels of a side; less is faster")
    budget = f"{int(SHARE * free / MIB)}MiB"
    planned = _composes([*begun.words, f"budget={budget}"])
    batch = BATCH if planned or "optim.batch_size" in given else largest_batch(compose(begun.words), total) or 1
    if batch < BATCH:
        settings["optim.batch_size"] = (str(batch), "what fits this GPU")
    profile = forecast.profile_composition(compose(begun.words), len(splits.classes), len(splits.train))
    said = f"predicted peak: {profile.memory.peak_mib:,.0f} MiB" if profile else "its memory can't be predicted"
    if planned and "budget" not in given:
        settings["budget"] = (budget, "most of what is free on this GPU; how to train in it is planned")
        said += " without the budget" if profile else ""
    return Start(settings, [*begun.found, f"{said}; this GPU has {total / MIB:,.0f} MiB. Its time isn't predicted"])


def _composes(words: list[str]) -> bool:
    """Returns whether words go together."""
    try:
        compose(words)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Choice:
    """A backbone and an image size: the words that choose them, and what an image takes."""

    words: list[str]
    name: str  # to read
    size: int  # pixels of a side of an image
    operations: int  # of the forward pass of one


def _choices(begun: Start, given: dict[str, str], side: int, classes: int) -> list[Choice]:
    """Returns what can be chosen, from accurate to fast; an image much larger than photos of `side` px is not."""
    tried = CHOICES if "backbone" not in given else ([], [SMALL])
    found: list[Choice] = []
    for words in tried:
        if SMALL in words and "backbone.image_size" in given:
            continue
        backbone = compose([*begun.words, *words]).backbone
        try:
            size, operations = durations.image_size(backbone, classes), durations.operations(backbone, classes)
        except UserError:  # a backbone that takes images of one size
            continue
        if not found or operations < found[-1].operations:
            found.append(Choice(words, f"{backbone.name} at {size} px", size, operations))
    if not found:  # what was given fits no backbone, which a training explains
        prepare(compose(begun.words))
    return [choice for choice in found if choice.size <= 1.5 * side] or found[-1:]


def _timed(begun: Start, splits: data.Splits, given: dict[str, str], side: int, seconds: float) -> Start:
    """Returns a start with the most accurate choice that takes no longer than `seconds` on this CPU.

    side: pixels of the shorter side of a photo.
    """
    choices = _choices(begun, given, side, len(splits.classes))
    fastest, epochs = choices[-1], int(begun.settings["optim.epochs"][0])
    untrained = [] if "backbone.checkpoint" in given else ["backbone.pretrained=false"]  # as fast, and not downloaded
    pace = durations.measure(prepare(compose([*begun.words, *fastest.words, *untrained, "device=cpu"])))

    def takes(choice: Choice, epochs: int) -> float:
        return durations.total(pace.scaled(choice.operations / fastest.operations), splits, epochs * len(splits.train))

    chosen = next((choice for choice in choices if takes(choice, epochs) <= seconds), fastest)
    settings = begun.settings | {
        word.partition("=")[0]: (word.partition("=")[2], "what this CPU does in time") for word in chosen.words
    }
    if "backbone.image_size" not in settings:
        settings["backbone.image_size"] = (str(chosen.size), "pixels of a side; less is faster")
    if takes(chosen, epochs) > seconds and "optim.epochs" not in given:
        epochs = max(FEWEST, int(epochs * seconds / takes(chosen, epochs)))
        settings["optim.epochs"] = (str(epochs), "few, as this CPU takes long for each")
    others = ", ".join(f"{one.name} {duration(takes(one, epochs))}" for one in choices if one is not chosen)
    said = f"{chosen.name} takes about {duration(takes(chosen, epochs))} on this CPU"
    said += f"; others: {others}" if others else ""
    return _remembered(Start(settings, [*begun.found, said]), splits, given)


def _remembered(begun: Start, splits: data.Splits, given: dict[str, str]) -> Start:
    """Returns a start that fits the memory of this machine, and says how much it is predicted to take."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
    if "budget" in given:
        said = f"how to train in {given['budget']} is planned before the first step; this machine has {there:,.0f} MiB"
        return Start(begun.settings, [*begun.found, said])

    def peak() -> float:
        profile = forecast.profile_composition(compose(begun.words), len(splits.classes), len(splits.train))
        return profile.memory.peak_mib if profile else 0.0

    taken = peak()
    if taken > there / 2 and "quant" not in given:
        begun.settings["quant"] = ("tiny", "codes of activations, recomputed blocks: little memory, more time")
        taken = peak()
    said = f"predicted peak of memory: {taken:,.0f} MiB; this machine has {there:,.0f} MiB"
    proposed = f"budget: {int(SHARE * _free())}MiB  # in the place of quant: how to train in so much memory is planned"
    return Start(begun.settings, [*begun.found, said], proposed)


def _free() -> float:
    """Returns the MiB of memory that processes can still have, or where that is not said, those of the machine."""
    try:
        kib = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        kib = None
    return int(kib[1]) / 1024 if kib else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
