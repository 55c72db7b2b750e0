"""The record of a run: `result.json`, documented key by key, and the identity under which a run is known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypedDict

from filelock import FileLock, Timeout

from s2a_cli import __version__
from s2a_cli.errors import UserError

SCHEMA = 1
LOCK = ".lock"  # in a run's folder, held by the process that is at it

# Settings that do not change what a run computes: where it runs, where its files lie, what it logs.
NOT_IDENTITY = (
    *("device", "busy", "workers", "tensorboard", "profile", "run_dir", "save_minutes", "save_steps"),
    *("dataset.root", "dataset.download", "backbone.checkpoint"),
)
# Settings that are younger than schema 1: at these values a run is the one that it was before there were any.
YOUNGER = {"dataset.cache": None, "dataset.layout": None, "method.segments": 1, "optim.head_lr": None}


class Accuracy(TypedDict):
    val_top1: float | None  # %, of the best epoch; null without a validation split
    test_top1: float | None  # %
    test_top5: float | None  # %; null with fewer than 6 classes
    best_epoch: int | None  # 1 is the first


class Parameters(TypedDict):
    total: int
    trainable: int  # head apart
    head: int
    percent: float  # trainable, as % of the backbone without its head


class MemoryRecord(TypedDict):
    kind: str  # measured-cuda | predicted
    peak_mib: float  # of a training step
    static_mib: float  # weights, buffers, optimiser state
    kept_mib: float  # for the backward pass: after the forward pass, less static
    full_finetune_peak_mib: float  # of full fine-tuning, same backbone, batch and precision, quant=none
    reserved_mib: float | None  # measured-cuda only: what the allocator took from the device
    full_finetune_kind: str  # predicted


class Throughput(TypedDict):
    train_images_per_second: float | None  # median over the steps after the first three; images already loaded


class Data(TypedDict):
    name: str  # of the data set in tables
    revision: str  # hash of the data's content
    classes: list[str]
    train: int  # images
    val: int
    test: int


class Result(TypedDict):
    schema: int
    id: str  # 12 hex digits, see identity()
    status: str  # ok | oom | failed | interrupted; the last also while the run is going on
    error: str | None  # one line
    config: dict[str, Any]  # resolved
    allocation: dict[str, Any] | None  # the quant settings that quant=auto chose; null where config has them
    accuracy: Accuracy
    parameters: Parameters
    memory: MemoryRecord | None
    throughput: Throughput
    data: Data
    weights: str  # fingerprint of the pretrained tensors
    environment: dict[str, Any]


def content(config: dict[str, Any], revision: str, weights: str) -> str:
    """All that decides what a run computes, as JSON: its resolved config less NOT_IDENTITY, data, weights, schema."""
    kept = json.loads(json.dumps(config))
    for key in NOT_IDENTITY:
        parent, _, name = key.rpartition(".")
        (kept[parent] if parent else kept).pop(name, None)
    for key, value in YOUNGER.items():
        parent, name = key.split(".")
        if kept[parent].get(name, value) == value:
            kept[parent].pop(name, None)
    return json.dumps({"config": kept, "data": revision, "weights": weights, "schema": SCHEMA}, sort_keys=True)


def identity(content: str) -> str:
    """12 hex digits: the SHA-256 of a run's `content`."""
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, as far as they bear on a run's figures."""
    import timm
    import torch

    from s2a_cli.activations import kernels

    cuda = device.startswith("cuda")
    return {
        "s2a": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.available() if cuda else "plain",  # what makes the codes
    }


@contextlib.contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place under `path` whole, at the end, or not at all.

    mode: who may read and write it; null: as for any new file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # moved already
            os.unlink(temporary)
        raise


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder, moved into place."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make_run_dir(path: Path) -> Path:
    """Creates a run's folder. Raises UserError when nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"run_dir={path}: can't be written to ({error.strerror}); set run_dir= to a folder that can") from None
    return path


class Busy(UserError):
    """Another process is at a run."""

    code = 75  # EX_TEMPFAIL: the input is not at fault, later it may go


@contextlib.contextmanager
def claimed(folder: Path, wait: float = 0) -> Iterator[None]:
    """Keeps other processes from running what this folder is for. Freed by the system when the process is killed.

    Raises Busy when another process has it, and still has it after `wait` seconds.
    """
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise Busy(f"{folder}: another process is at this run; wait for it, or set run_dir= to another folder") from None
    try:
        for litter in folder.glob(".*.????????"):  # temporary files of a process that was killed inside a write
            litter.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def write_result(folder: Path, result: Result) -> None:
    atomic_write(folder / "result.json", json.dumps(result, indent=2, default=str) + "\n")


def read_result(folder: Path) -> Result:
    """The record in a run's folder. Raises UserError when there is none or it can't be read."""
    path = Path(folder) / "result.json"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no result.json there; give the folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path}: not a result of schema {SCHEMA}")
    for quant in (result["config"]["quant"], result.get("allocation") or {}):
        if "blocks" in quant:  # JSON has no integer keys
            quant["blocks"] = {int(number): settings for number, settings in quant["blocks"].items()}
    return result


def finished(folder: Path, content: str) -> Result | None:
    """The record of a run that is done: `content` is what it computes. None while it is not."""
    try:
        result = read_result(folder)
    except UserError:  # no record, or one that is damaged or of another schema: as if there were none
        return None
    same = content_of(result) == content
    return result if same and result["status"] == "ok" else None


def content_of(result: Result) -> str:
    """The `content` of the run that a record is of."""
    return content(result["config"], result["data"]["revision"], result["weights"])
