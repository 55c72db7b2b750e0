"""Looks at a finished run for its page: what it answers on its test split, and where its memory goes."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import one_line, type_and_first_line
from s2a_cli.data import Images
from s2a_cli.data.photos import THUMBNAIL, thumbnail
from s2a_cli.memory.breakdown import Profile
from s2a_cli.memory.result import MIB
from s2a_cli.memory.watch import NAMES, USES
from s2a_cli.results import record
from s2a_cli.results.run_report import Tested, Uses, least_certain, most_confident_mistakes
from s2a_cli.training import testing
from s2a_cli.training.forecast import full_finetuning, profile_step
from s2a_cli.training.run import attach
from s2a_cli.training.trained import load_as

OF_KEPT = (
    "What is kept for backward counts here as far as it is alive at the peak; in the bar, at the end of the forward"
    " pass, with images and loss."
)


def tested(folder: Path, config: DictConfig) -> tuple[Tested | None, str]:
    """Tests a run on its own test split, or returns None and why it can't be."""
    if not config.test:
        return None, "The run left its test split alone (test=false)."
    try:
        labelled = testing.own_test(folder, config)
        evaluation = testing.evaluate(load_as(folder, config), labelled)
    except UserError as error:
        return None, f"Not tested here: {one_line(error)}"
    mistakes, uncertain = most_confident_mistakes(evaluation), least_certain(evaluation)
    thumbnails = _thumbnails(labelled.images, {picture.place for picture in (*mistakes, *uncertain)})
    return Tested(evaluation, mistakes, uncertain, thumbnails), ""


def _thumbnails(images: Images, places: set[int]) -> dict[int, bytes]:
    """Returns small JPEGs of some images."""
    return {place: thumbnail(images.image(place, at_least=2 * THUMBNAIL)) for place in sorted(places)}


def uses(config: DictConfig, result: record.Result) -> Uses | None:
    """Predicts what is alive at the peak of a run's step, by use; None where it can't be predicted."""
    classes, images = len(result["data"]["classes"]), result["data"]["train"]
    if config.compile:
        return None
    try:
        backbone = backbones.build(config.backbone, classes, meta=True)
        mine = profile_step(attach(config, backbone), config, images)
        full = profile_step(*full_finetuning(config, classes), images)
    except Exception as error:  # a model of timm whose forward pass reads values can't run without data
        print(f"the memory of this run can't be predicted: {type_and_first_line(error)}")
        return None
    where = f"The peak is in the {mine.phase} pass, at {mine.place}; predicted."
    return Uses(_by_use(mine), _by_use(full), f"{where} {OF_KEPT}")


def _by_use(profile: Profile) -> dict[str, float]:
    found = profile.by("use")
    names = NAMES | {"kept": f"{NAMES['kept']}, alive then"}
    return {names[use]: found[(use,)] / MIB for use in USES if found.get((use,))}
