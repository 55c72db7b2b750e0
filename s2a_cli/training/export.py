"""Writes a trained model in a form that others load without this package, and checks it on photos first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from s2a_cli.backbones.frozen_weights import restore
from s2a_cli.backbones.pretrained import checkpoint_file, pretrained_cfg
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import sha256_of
from s2a_cli.common.text import first_line, listed
from s2a_cli.config.settings import plain
from s2a_cli.data import photos
from s2a_cli.data.transforms import ImageConfig
from s2a_cli.results import export_files, model_card
from s2a_cli.training import testing
from s2a_cli.training.export_formats import FORMATS, Format, described, quiet
from s2a_cli.training.trained import Trained, load_as

TOLERANCE = 1e-4  # of logits, relative to the largest
CHECKED = 8  # photos that an export is checked on


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how it was checked."""

    files: list[Path]
    use: str  # lines of Python that load it
    difference: float  # the largest of the logits from the run's, relative to the largest logit
    photos: int  # that it was checked on


def export(
    config: DictConfig, folder: Path, out: Path, to: str = "timm", images: Sequence[str] = (), force: bool = False
) -> Exported:
    """Writes the model of a finished run, in fp32, with its preprocessing, its class names and a model card.

    config: the run's. to: one of FORMATS. out: the folder of to=timm, else a file. images: files or folders of photos
    to check on; by default those of the run's test split. Before anything is in place the model is loaded again, as its
    users will, and its logits are compared with the run's. Raises UserError where they differ, where plain weights
    can't hold what was trained, and where `out` is there and `force` is false; nothing is left then.
    """
    export_files.check(to, out, force)
    form = FORMATS[to]
    trained = load_as(folder, config)
    shown = _photos(trained, images)
    trained.model.float()  # what is written; in 16 bits a merged weight would be rounded once more
    description = _description(trained)
    with torch.no_grad():
        expected = trained.model(shown)
        model = _written_model(trained, to, form)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        except OSError as error:
            raise UserError(f"out={out}: can't be written to ({error.strerror})") from None
        try:
            with quiet():
                _write(form, model, shown, made / out.name, description)
                difference = _difference(form, made / out.name, shown, expected)
            card = model_card.text(
                trained.record, description, form.use.replace("PATH", out.name), difference, len(shown)
            )
            about, read_me = export_files.beside(to, made / out.name)
            about.write_text(described(description), encoding="utf-8")
            read_me.write_text(card, encoding="utf-8")
            files = _moved(made, out)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return Exported(files, form.use.replace("PATH", str(out)), difference, len(shown))


def _photos(trained: Trained, images: Sequence[str]) -> Tensor:
    """Returns some photos [B, 3, H, W] to check on. Raises UserError where there are none."""
    if images:
        found = list(photos.read(photos.find(images)[:CHECKED], trained.transform))
        readable = [photo.pixels for photo in found if photo.pixels is not None]
        if not readable:
            raise UserError(f"images={listed(images)}: no photo to check on; {found[0].path}: {found[0].trouble}")
        return torch.stack(readable)
    try:
        test = testing.own_test(trained.folder, trained.config).images
        places = range(0, len(test), max(1, len(test) // CHECKED))[:CHECKED]
        return torch.stack([trained.transform(test.image(place, trained.transform.at_least)) for place in places])
    except UserError as error:
        raise UserError(
            f"{first_line(error, 400)} (an export is checked on the run's test photos, or on those that"
            " images=FOLDER names)"
        ) from None


def _written_model(trained: Trained, to: str, form: Format) -> nn.Module:
    """Returns the model to write: merged into plain weights where that can be, else with what stands beside it."""
    if not trained.attached.unmergeable:
        return trained.attached.merge().eval().requires_grad_(False)
    if form.plain:
        others = " or ".join(f"to={name}" for name, other in FORMATS.items() if not other.plain)
        raise UserError(f"to={to}: {trained.attached.unmergeable}; {others} write it as a part of the graph")
    restore(trained.model)
    return trained.model.eval().requires_grad_(False)


def _write(form: Format, model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    try:
        form.write(model, images, path, description)
    except OSError as error:
        raise UserError(f"export: can't be written ({error.strerror})") from None
    except Exception as error:  # exporters raise kinds of their own for what a graph can't hold
        raise UserError(f"export: no such file can be made of this model ({first_line(error)})") from None


def _difference(form: Format, path: Path, images: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of the logits of what was written, in two sizes of batch. Raises UserError."""
    try:
        again = form.load(path)
        logits = torch.cat([again(images), again(images[:1])])
    except Exception as error:  # whatever its loader raises: it can't be used
        raise UserError(f"export: what was written can't be loaded again ({first_line(error)})") from None
    difference = (logits - torch.cat([expected, expected[:1]])).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(f"export: the exported model's logits differ from the run's by {difference:.1e} of the largest")
    return difference.item()


def _moved(made: Path, out: Path) -> list[Path]:
    """Moves what was made into place; an earlier export goes when this one is whole."""
    if (made / out.name).is_dir():
        try:
            if out.is_dir():
                out.rename(made / "earlier")
            (made / out.name).rename(out)
        except BaseException:  # a Ctrl-C, too
            if (made / "earlier").is_dir() and not out.exists():
                (made / "earlier").rename(out)
            raise
        os.chmod(out, 0o755)
        return sorted(out.iterdir())
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name == out.name)
    for name in names:
        os.replace(made / name, out.with_name(name))
    return [out.with_name(name) for name in reversed(names)]


def _description(trained: Trained) -> dict[str, Any]:
    """Returns what timm needs to make the model, what its images and classes are, and how photos become images."""
    model, image, config = trained.model, trained.attached.backbone.image, trained.config
    known, arguments = pretrained_cfg(model), plain(config.backbone.kwargs)
    if image.size != known["input_size"][-1] and hasattr(model, "set_input_size"):
        arguments = {**arguments, "img_size": image.size}
    return {
        "architecture": config.backbone.timm.split(".")[0],
        "num_classes": len(trained.classes),
        "label_names": trained.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, image.size, image.size],
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
            "num_classes": len(trained.classes),
            "custom_load": False,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
            "fixed_input_size": known.get("fixed_input_size", False),
        },
        "preprocessing": _preprocessing(image, trained.transform.at_least),
        **_weights(config.backbone, known),
    }


def _weights(config: DictConfig, known: dict[str, Any]) -> dict[str, Any]:
    """Returns which weights a backbone began with, and their licence; "other" is that of a file from elsewhere."""
    if not config.pretrained:
        return {"weights": "random", "license": None}
    if config.checkpoint:
        file = checkpoint_file(config.checkpoint)
        return {"weights": f"{file.name} (SHA-256 {sha256_of(file)})", "license": "other"}
    return {
        "weights": known.get("hf_hub_id") or known.get("url") or config.timm,
        "license": known.get("license"),
    }


def _preprocessing(image: ImageConfig, at_least: int) -> dict[str, Any]:
    """Returns how a photo becomes an image, in full: what is left open here moves logits by percents.

    Rules are expressions of Python over the names beside them. at_least: of the transform.
    """
    return {
        "decode": "8-bit RGB, upright by the EXIF orientation, transparency over white; a JPEG whose shorter side has"
        f" {2 * at_least} px or more at 1/2, 1/4 or 1/8 of its size, {at_least} px or more (Pillow's draft)",
        "resize_shorter_side": image.resize,
        "resize_longer_side": "int(resize_shorter_side * longer / shorter)",
        "interpolation": image.interpolation,
        "antialias": True,
        "resample": "as Pillow's Image.resize does, to 8 bits a value",
        "center_crop": image.size,
        "crop_left": "int(round((width - center_crop) / 2))",
        "crop_top": "int(round((height - center_crop) / 2))",
        "rounding": "int drops the fraction, round takes a half to the even integer",
        "scale": "1/255",
        "mean": list(image.mean),
        "std": list(image.std),
        "input": "float32 [batch, 3, center_crop, center_crop], RGB: (value * scale - mean) / std",
    }
