"""Writes a trained model as plain weights, in a folder from which timm makes it without this package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from s2a_cli import backbones
from s2a_cli.backbones import Backbone
from s2a_cli.backbones.pretrained import pretrained_cfg
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there
from s2a_cli.common.text import first_line
from s2a_cli.config.settings import plain
from s2a_cli.results import record
from s2a_cli.training import checkpoints
from s2a_cli.training.run import attach

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # as timm names them in a folder
TOLERANCE = 1e-4  # of logits, relative to the largest


def export(config: DictConfig, folder: Path, out: Path, force: bool = False) -> float:
    """Merges a finished run into plain weights and writes them to the folder `out`, made anew.

    `timm.create_model("local-dir:OUT", pretrained=True)` then makes the model. Before anything is there, it is made so
    and compared with the run on random images; returns the largest difference of their logits, relative to the largest
    logit. Raises UserError where the method can't be merged, timm can't make the model, or `out` is there and `force`
    is false; nothing is left then.
    """
    if is_there(out) and not force:
        raise UserError(f"out={out}: is there already; choose another folder, or add --force")
    if out.is_dir() and (
        strangers := sorted(path.name for path in out.iterdir() if path.name not in (WEIGHTS, CONFIG))
    ):
        raise UserError(f"out={out}: holds {strangers[0]}, which is not of an export; choose another folder")
    classes = record.read_result(folder)["data"]["classes"]
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, len(classes))
    weights = backbone.fingerprint()
    attached = attach(config, backbone)
    checkpoints.load(folder, backbone.model, weights)
    size = backbone.image.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    backbone.model.float()  # what is written; in 16 bits a merged weight would be rounded once more
    trained = _logits(backbone.model, images)
    model = attached.merge()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"out={out}: can't be written to ({error.strerror})") from None
    try:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        (made / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        (made / CONFIG).write_text(json.dumps(_description(config, backbone, classes), indent=2) + "\n")
        difference = _difference(made, images, trained)
        os.chmod(made, 0o755)
        if out.is_dir():  # the earlier export goes when this one is in its place
            earlier = made.with_name(f"{made.name}.earlier")
            out.rename(earlier)
            made.rename(out)
            shutil.rmtree(earlier)
        else:
            made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return difference


def _description(config: DictConfig, backbone: Backbone, classes: list[str]) -> dict[str, Any]:
    """Returns what timm needs to make the model, and what its images and classes are."""
    model, image = backbone.model, backbone.image
    known, arguments = pretrained_cfg(model), plain(config.backbone.kwargs)
    if image.size != known["input_size"][-1] and hasattr(model, "set_input_size"):
        arguments = {**arguments, "img_size": image.size}
    return {
        "architecture": config.backbone.timm.split(".")[0],
        "num_classes": len(classes),
        "label_names": classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, image.size, image.size],
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
            "num_classes": len(classes),
            "custom_load": False,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
            "fixed_input_size": known.get("fixed_input_size", False),
        },
    }


def _difference(made: Path, images: Tensor, trained: Tensor) -> float:
    """Returns the largest difference of the logits of the model that timm makes. Raises UserError where it fails."""
    try:
        again = timm.create_model(f"local-dir:{made}", pretrained=True)
    except Exception as error:  # models check their settings in ways of their own
        raise UserError(f"export: timm can't make this model from plain weights ({first_line(error)})") from None
    difference = ((_logits(again, images) - trained).abs().max() / trained.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(f"export: the merged model's logits differ from the run's by {difference:.1e} of the largest")
    return difference


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits [B, classes] of images in evaluation."""
    return model.eval()(images)
