"""Saves what a run has trained, whole or not at all.

A finished epoch saves its trainable tensors (not the backbone) and its calibration as safetensors. A run that goes on
also saves the state from which it can go on exactly as if it had not been broken off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from s2a_cli.common import tensor_files
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_file, atomic_write
from s2a_cli.common.text import first_line, printable
from s2a_cli.results.run_folder import STATE, TENSORS
from s2a_cli.training.step import moving_norms

FILE = TENSORS
KEYS = (
    "content",
    "accuracy",
    "sofar",
    "model",
    "calibration",
    "optimizer",
    "schedule",
    "scaler",
)  # of the state
RENAMED = {".vote.": ".classifier."}  # parts of tensors' names in files of version 0.1.0 -> as they are now
TRAINED = "trained_buffers"  # the attribute by which a module names buffers that a run changes
CALIBRATION = "calibration."  # before the names of what the codes of a run were fitted to


def trained_names(model: nn.Module) -> set[str]:
    """Returns the names of the tensors of a model that training changes.

    These are trainable parameters, statistics of BatchNorms that move, and the buffers that a module names in
    its `trained_buffers`.
    """
    changed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moving = set(moving_norms(model))
    for prefix, module in model.named_modules():
        if module in moving:
            changed |= {f"{prefix}.{name}" for name, _ in module.named_buffers()}
        changed |= {f"{prefix}.{name}" for name in getattr(module, TRAINED, ())}
    return changed


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies on the CPU of what a run changes, see `trained_names`."""
    changed = trained_names(model)
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items() if name in changed}
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies such a state back into the model."""
    model.load_state_dict({present_name(name): tensor for name, tensor in state.items()}, strict=False)


def present_name(name: str) -> str:
    """Returns the name that a tensor of a saved file has now."""
    for before, now in RENAMED.items():
        name = name.replace(before, now)
    return name


def save(folder: Path, state: dict[str, Tensor], calibration: dict[str, Tensor], weights: str) -> None:
    """Writes a state to a run's folder with what its codes were fitted to.

    weights: the fingerprint of the backbone weights that it belongs to.
    """
    tensors = state | {CALIBRATION + name: tensor for name, tensor in calibration.items()}
    atomic_write(folder / FILE, safetensors.torch.save(tensors, metadata={"weights": weights}))


def load(folder: Path, model: nn.Module, weights: str) -> None:
    """Loads a run's tensors into a model to which the run's method is attached.

    Raises UserError when the file is missing, damaged, of another model, or trained on other backbone weights.
    """
    path = Path(folder) / FILE
    if not tensor_files.is_file(path):
        raise UserError(f"{path}: no such file; the run has saved no tensors")
    expected = {name: tuple(tensor.shape) for name, tensor in trainable_state(model).items()}
    try:
        with safetensors.safe_open(path, "pt") as file:
            trained_on = (file.metadata() or {}).get("weights")
            saved = {name: shape for name, shape in tensor_files.shapes(file) if not name.startswith(CALIBRATION)}
            there = {present_name(name): shape for name, shape in saved.items()}
            state = {name: file.get_tensor(name) for name in saved} if there == expected else {}
    except Exception as error:  # safetensors, the system and torch raise kinds of their own for a damaged file
        raise UserError(f"{path}: damaged ({first_line(error)})") from None
    if there != expected:
        odd = sorted(there.keys() ^ expected.keys()) or [k for k in there if there[k] != expected[k]]
        raise UserError(
            f"{path}: its tensors are not those of this backbone and method (first difference: {printable(odd[0])})"
        )
    if trained_on != weights:
        raise UserError(
            f"{path}: trained on backbone weights {printable(str(trained_on))}, but the config's have the fingerprint"
            f" {weights}"
        )
    restore(model, state)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state of an unfinished run: tensors, numbers, texts, and dicts and lists of these."""
    with atomic_file(folder / STATE) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of torch's writer, about a write that failed: the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_state(folder: Path) -> dict[str, Any] | None:
    """Returns the state in a run's folder, None where there is none. Raises UserError when it is damaged."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    if not tensor_files.is_file(path):
        raise UserError(f"{path}: no regular file; remove it, or start again with --force")
    try:
        state = tensor_files.read(path)
    except tensor_files.Unreadable as error:
        raise damaged(path, error) from None
    if not isinstance(state, dict) or (lacking := [key for key in KEYS if key not in state]):
        raise damaged(path, f"lacks {lacking[0]}" if isinstance(state, dict) else "no state")
    if not isinstance(state["sofar"], dict) or not {"epoch", "step"} <= state["sofar"].keys():
        raise damaged(path, "says not where the run was")
    return state


def damaged(path: Path, reason: object) -> UserError:
    """Returns what to say about the state of an unfinished run from which none can go on."""
    return UserError(f"{path}: damaged ({reason}); remove it, or start again with --force")
