"""Reads pretrained weights from files."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from torch import Tensor, nn

from s2a_cli.common import tensor_files
from s2a_cli.common.errors import UserError
from s2a_cli.common.tensor_files import Unreadable
from s2a_cli.common.text import first_line, listed
from s2a_cli.config.paths import EMBEDDED, missing_checkpoint

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")  # keys under which training scripts save
BESIDE = 64 * 2**20  # bytes of a .npz beside four times the model's: a head of 21,843 classes


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Returns what timm knows of a model's weights: input_size, mean, std, classifier, address and so on."""
    return cast(dict[str, Any], model.pretrained_cfg)


def load_checkpoint(model: nn.Module, checkpoint: str, head: list[str]) -> None:
    """Loads pretrained tensors from a file (.safetensors, .pth or a ViT's .npz), without the head in it.

    head: names of the layers of the model's head. Names of timm's for the head in the file are left out as well.
    Formats other than timm's go through timm's filter for the family. Raises UserError for a file that is missing,
    damaged, or does not fit; the message lists missing and unexpected keys.
    """
    path = checkpoint_file(checkpoint)
    if not tensor_files.is_file(path):
        raise UserError(missing_checkpoint(checkpoint))
    if path.suffix == ".npz":
        return _load_npz(model, path)
    state = _read_tensors(path, model)
    classifiers = pretrained_cfg(model).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = tuple(f"{name}." for name in (*classifiers, *head))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    counters = tuple(k for k in {**own, **state} if k.endswith("num_batches_tracked"))  # older files have none
    missing = [k for k in own if k not in state and k not in counters]
    unexpected = sorted(k for k in state if k not in own and k not in counters)
    shapes = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
        said = "; ".join(f"{len(keys)} {what}: {listed(keys, 6)}" for what, keys in parts.items() if keys)
        raise UserError(f"backbone.checkpoint={checkpoint} is not of {type(model).__name__} as configured: {said}")
    try:
        model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items() if k in own}, strict=False)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"backbone.checkpoint={checkpoint}: can't be loaded ({first_line(error)})") from None


def map_tensors(model: nn.Module, checkpoint: str) -> None:
    """Puts tensors of a .safetensors file in the place of the equal ones of a model, which it was loaded from.

    They then are no memory of this process, but the system's cache of the file, which can be dropped and read again.
    checkpoint: of the config; empty for the file that timm has downloaded. What differs from the file, as in its dtype,
    stays as it is.
    """
    path = checkpoint_file(checkpoint) if checkpoint else _downloaded(model)
    if path is None or path.suffix != ".safetensors":
        return
    own = dict(model.named_parameters())
    for name, tensor in _read_tensors(path, model).items():
        there = own.get(name)
        if there is not None and tensor.dtype == there.dtype and torch.equal(tensor, there):
            there.data = tensor


def checkpoint_file(checkpoint: str) -> Path:
    """Returns the path of a checkpoint."""
    if checkpoint.startswith(EMBEDDED):
        return Path(__file__).parents[1] / "weights" / checkpoint.removeprefix(EMBEDDED)
    return Path(checkpoint).expanduser()


def _downloaded(model: nn.Module) -> Path | None:
    """Returns the .safetensors file from the hub that timm reads a model's weights from; None where there is none."""
    repository = pretrained_cfg(model).get("hf_hub_id")
    found = huggingface_hub.try_to_load_from_cache(repository, "model.safetensors") if repository else None
    return Path(found) if isinstance(found, str) else None


def _read_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a file by their names in the model. Raises UserError."""
    try:
        state = tensor_files.tensors(tensor_files.read(path), WRAPPERS, path.stat().st_size)
    except Unreadable as error:
        raise UserError(f"backbone.checkpoint={path}: can't be read as tensors: {error}") from None
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt:
        with contextlib.suppress(Exception):  # another family's keys: reported by name where they are missing
            return adapt(state, model)
    return state


def _load_npz(model: Any, path: Path) -> None:
    """Loads a ViT's .npz into a model of timm that reads them, and keeps its head. Raises UserError."""
    if not hasattr(model, "load_pretrained"):
        raise UserError(
            f"backbone.checkpoint={path}: {type(model).__name__} has no .npz format; use .safetensors or .pth"
        )
    head = model.get_classifier()
    own = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    kind = f"{type(model).__name__} as configured"
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        names = tensor_files.check_arrays(path, 4 * size + BESIDE)
    except Unreadable as error:
        raise UserError(f"backbone.checkpoint={path}: can't be read as arrays of a {kind}: {error}") from None
    blocks = {name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")}
    if len(blocks) > len(model.blocks):
        raise UserError(
            f"backbone.checkpoint={path} is not of {kind}: it has {len(blocks)} blocks, the model {len(model.blocks)}"
        )
    try:
        model.load_pretrained(str(path))
    except KeyError as error:
        raise UserError(f"backbone.checkpoint={path} is not of {kind}: lacks {error}") from None
    except Exception as error:  # arrays of other shapes fail wherever timm turns and reshapes them
        raise UserError(
            f"backbone.checkpoint={path}: can't be loaded into {type(model).__name__} ({first_line(error)})"
        ) from None
    head.load_state_dict(own)  # timm takes the file's head where the number of classes is the same
