"""Reading pretrained weights from files."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from s2a_cli.errors import UserError, first_line

EMBEDDED = "embedded:"  # prefix of a checkpoint that ships in s2a_cli/weights/


def load_checkpoint(model: nn.Module, checkpoint: str, head: list[str]) -> None:
    """Loads pretrained tensors from a file (.safetensors, .pth or a ViT's .npz); a head in it is left out.

    head: names of the layers of the model's own head, beside which those that timm says are in the file's.

    Formats other than timm's own go through timm's filter for the family. Raises UserError for a file that is missing,
    damaged, or does not fit; the message lists missing and unexpected keys.
    """
    embedded = checkpoint.startswith(EMBEDDED)
    path = Path(__file__).parents[1] / "weights" / checkpoint.removeprefix(EMBEDDED) if embedded else Path(checkpoint).expanduser()
    if not path.is_file():
        raise UserError(f"backbone.checkpoint={checkpoint}: no such file")
    if path.suffix == ".npz":
        return _load_npz(model, path)
    state = _read_tensors(path)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt:
        try:
            state = adapt(state, model)
        except (KeyError, RuntimeError, AttributeError, IndexError, ValueError):
            pass  # another family's keys: reported below by name
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = tuple(f"{name}." for name in (*classifiers, *head))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    counters = tuple(k for k in {**own, **state} if k.endswith("num_batches_tracked"))  # older files have none
    missing = [k for k in own if k not in state and k not in counters]
    unexpected = sorted(k for k in state if k not in own and k not in counters)
    shapes = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
        said = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in parts.items() if keys)
        raise UserError(f"backbone.checkpoint={checkpoint} is not of {type(model).__name__} as configured: {said}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items() if k in own}, strict=False)


def _few(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch raise kinds of their own for a damaged file
        reason = first_line(error)
        raise UserError(f"backbone.checkpoint={path}: can't be read as tensors, damaged or of another format ({reason})") from None
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        wrapped = next((content[k] for k in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher") if k in content), None)
        if wrapped is None:
            break
        content = wrapped
    if not isinstance(content, dict):
        raise UserError(f"backbone.checkpoint={path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}


def _load_npz(model: nn.Module, path: Path) -> None:
    if not hasattr(model, "load_pretrained"):
        raise UserError(f"backbone.checkpoint={path}: {type(model).__name__} has no .npz format; use .safetensors or .pth")
    head = model.get_classifier()
    own = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        with np.load(path) as arrays:
            blocks = {name.split("/")[1] for name in arrays.files if name.startswith("Transformer/encoderblock_")}
        if len(blocks) > len(model.blocks):
            raise UserError(
                f"backbone.checkpoint={path} is not of {type(model).__name__} as configured:"
                f" it has {len(blocks)} blocks, the model {len(model.blocks)}"
            )
        model.load_pretrained(str(path))
    except KeyError as error:
        raise UserError(f"backbone.checkpoint={path} is not of {type(model).__name__} as configured: lacks {error}") from None
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"backbone.checkpoint={path}: can't be loaded into {type(model).__name__} ({first_line(error)})") from None
    head.load_state_dict(own)  # timm takes the file's head where the number of classes is the same
