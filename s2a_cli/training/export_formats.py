"""The forms in which a trained model is handed on: each is written, and loaded again as its users load it."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from s2a_cli.results.export_files import CONFIG, WEIGHTS

INPUT, OUTPUT = "images", "logits"  # of a graph
BATCH = 2  # images of the batch that a graph is recorded with; any other number fits as well

Logits = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> logits [B, classes]


@dataclass(frozen=True)
class Format:
    """A form of a model on disk.

    plain: whether it holds weights alone, of a model that timm makes, so that a structure has to be merged. write:
    (model, images [B, 3, H, W], path, description). load: path -> logits of images. use: lines of Python that load it,
    in which PATH stands for the path.
    """

    plain: bool
    write: Callable[[nn.Module, Tensor, Path, dict[str, Any]], None]
    load: Callable[[Path], Logits]
    use: str


def described(description: dict[str, Any]) -> str:
    """Returns the text of a file that describes a model."""
    return json.dumps(description, indent=2) + "\n"


def _batch(images: Tensor) -> Tensor:
    """Returns BATCH of the images, one alone several times: of a single one a graph would be for one image alone."""
    return images[torch.arange(BATCH) % len(images)]


def _write_timm(model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    path.mkdir()
    _write_safetensors(model, images, path / WEIGHTS, description)
    (path / CONFIG).write_text(described(description), encoding="utf-8")


def _load_timm(path: Path) -> Logits:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "config": json.dumps(description)}))


def _load_safetensors(path: Path) -> Logits:
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["config"])
    arguments = description["model_args"]
    model = timm.create_model(description["architecture"], num_classes=description["num_classes"], **arguments)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()


def _write_torchscript(model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    traced = torch.jit.trace(model, _batch(images), check_trace=False)  # `load` is checked on other images
    made = io.BytesIO()  # writing to the file itself ends the process where the disk is full
    torch.jit.save(traced, made, _extra_files={CONFIG: described(description)})
    path.write_bytes(made.getbuffer())


def _load_torchscript(path: Path) -> Logits:
    return torch.jit.load(str(path), map_location="cpu").eval()


def _exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (_batch(images),), dynamic_shapes=({0: batch},), strict=False)


def _write_torch_export(model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    made = io.BytesIO()
    torch.export.save(_exported(model, images), made, extra_files={CONFIG: described(description)})
    path.write_bytes(made.getbuffer())


def _load_torch_export(path: Path) -> Logits:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, images: Tensor, path: Path, description: dict[str, Any]) -> None:
    program = torch.onnx.export(
        _exported(model, images), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None, "the exporter that torch.export stands behind returns a program"
    program.model.metadata_props["config"] = json.dumps(description)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Logits:
    import onnxruntime  # pyright: ignore[reportMissingImports]  # optional

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


FORMATS = {
    "timm": Format(
        True, _write_timm, _load_timm, 'model = timm.create_model("local-dir:PATH", pretrained=True).eval()'
    ),
    "safetensors": Format(
        True,
        _write_safetensors,
        _load_safetensors,
        'tensors = safetensors.torch.load_file("PATH")  # of the timm model that PATH.json describes',
    ),
    "onnx": Format(
        False,
        _write_onnx,
        _load_onnx,
        'session = onnxruntime.InferenceSession("PATH")\nlogits = session.run(["logits"], {"images": images})[0]',
    ),
    "torchscript": Format(False, _write_torchscript, _load_torchscript, 'model = torch.jit.load("PATH").eval()'),
    "torch-export": Format(
        False, _write_torch_export, _load_torch_export, 'model = torch.export.load("PATH").module()'
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' remarks about their own versions from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
