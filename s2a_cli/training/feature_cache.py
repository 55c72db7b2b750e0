"""Keeps what the trained part reads of a frozen backbone in files, computed once for each image (`dataset.cache`).

A file holds one split: a JSON header that says all on which its content depends, then a row of bytes for each image,
and one for its mirror image behind it where training mirrors, then a checksum of all this. Runs of one user that would
compute the same read the same files.

A run checks a file once, when it opens it: that it is a regular file of this user, that its header and its length are
those expected, and the checksum over every byte, which reads the file as one epoch does; then that a batch of it equals
what the model computes now. A file that is damaged or of another content is filled again, one of another user is
refused. From then on the file that was checked stays open; what is read from it while training is not checked again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from s2a_cli import data
from s2a_cli.activations import REFERENCE
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.common.files import atomic_file, lock
from s2a_cli.common.interrupts import guarded, stopping
from s2a_cli.common.progress import Progress
from s2a_cli.config.settings import plain, replaced
from s2a_cli.data.batches import Batches
from s2a_cli.memory.result import MIB
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.feature_head import Features
from s2a_cli.training.step import Step

if TYPE_CHECKING:
    from s2a_cli.training.run import Run

SCHEMA = 2  # of the files
# Weights that give the same to the bit; those that are still to be planned are looked for as the exact ones first.
AS_FP32 = {"offload": "fp32", "auto": "fp32"}
HEADER = 4096  # bytes, or a multiple of it
PRIVATE = 0o600  # what the backbone sees of photos, which may be private
CHUNK = 1 << 22  # bytes
IMAGES = 16  # in a forward pass that fills a file, at most
# Settings of a data set that change no kept image.
ELSEWHERE = ("root", "file", "test_root", "download", "cache", "scale", "hflip")


class Kept:
    """Is one split's file: rows of `fields`, each (shape without the batch, dtype), for `images` images.

    mirrored: whether each image has a second row, that of its mirror image.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        images: int,
        mirrored: bool,
        fields: list[tuple[tuple[int, ...], torch.dtype]],
    ):
        self.fields, self.mirrored = fields, mirrored
        self.rows = images * (1 + mirrored)
        self.sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in fields]
        about = key | {"rows": self.rows, "tensors": [[list(shape), str(dtype)] for shape, dtype in fields]}
        text = json.dumps(about, sort_keys=True).encode()
        self.path = folder / f"{key['split']}-{sha256(text).hexdigest()[:16]}.taps"
        self.header = text.ljust(-(-(len(text) + 1) // HEADER) * HEADER - 1) + b"\n"
        self._map: np.memmap | None = None  # of the file that was found whole

    @property
    def bytes(self) -> int:
        return len(self.header) + self.rows * sum(self.sizes) + sha256().digest_size

    def whole(self) -> bool:
        """Returns whether the file is there, and every byte as it was written; it then stays open.

        Raises UserError for a file of another user, and for one that is none, such as a link or a pipe.
        """
        if self._map is not None:
            return True
        try:
            file = open(self.path, "rb", opener=_opener)  # noqa: SIM115 (the errors of opening are told apart)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
                raise self._refused("is no regular file") from None
            return False
        with file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise self._refused("is no regular file")
            if about.st_uid != _me(self.path.parent):
                raise self._refused("belongs to another user")
            content = self.bytes - sha256().digest_size
            if about.st_size != self.bytes or file.read(len(self.header)) != self.header:
                return False
            if os.pread(file.fileno(), self.bytes - content, content) != _checksum(file, content):
                return False
            self._map = np.memmap(file, np.uint8, "r", offset=len(self.header), shape=(self.rows, sum(self.sizes)))
        return True

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"dataset.cache=features: {self.path} {why}: it could hold anything; remove it, or point S2A_DATA elsewhere"
        )

    def write(self, batches: Iterator[Sequence[Features]]) -> None:
        """Fills the file: whole, or not at all.

        batches: the features of some images, and those of their mirror images.
        """
        self._map = None
        with atomic_file(self.path, PRIVATE) as file:
            file.write(self.header)
            for views in batches:
                rows = [
                    torch.cat([t.cpu().flatten(1).contiguous().view(torch.uint8) for t in features.tensors], 1)
                    for features in views
                ]
                file.write(torch.stack(rows, 1).numpy().tobytes())
            file.flush()
            file.write(_checksum(file, self.bytes - sha256().digest_size))

    def discard(self) -> None:
        self._map = None
        self.path.unlink(missing_ok=True)

    def batch(self, rows: Sequence[int]) -> Features:
        """Returns those rows, read from the disk or the system's cache of it.

        Raises RunError where the file is not whole.
        """
        if not self.whole():
            raise RunError(f"dataset.cache=features: {self.path} was changed or removed since it was filled")
        assert self._map is not None
        parts = torch.from_numpy(self._map[list(rows)]).split(self.sizes, 1)
        own = (part.clone(memory_format=torch.contiguous_format) for part in parts)  # aligned, unlike a view of a row
        return Features(part.view(dtype).view(-1, *shape) for part, (shape, dtype) in zip(own, self.fields))


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for one that writes


def _me(folder: Path) -> int:
    """Returns the owner of what this process writes there: not always its own number, on a disk of another machine."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:  # a disk that is full, or can't be written to
        return os.geteuid()


def _checksum(file: IO[bytes], size: int) -> bytes:
    """Returns the SHA-256 of those of each CHUNK of the first `size` bytes, which threads read and hash together."""

    def one(start: int) -> bytes:
        return sha256(os.pread(file.fileno(), min(CHUNK, size - start), start)).digest()

    whole = sha256()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for digest in pool.map(one, range(0, size, CHUNK)):
            whole.update(digest)
    return whole.digest()


class FeatureLoader(data.Loader):
    """Yields batches of (Features, labels).

    Their order and mirror images are those of the `Loader` that loads the images themselves.
    """

    def __init__(
        self,
        kept: Kept,
        images: data.Images,
        config: DictConfig,
        train: bool,
        part: tuple[int, int],
        weights: np.ndarray | None = None,
    ):
        self._batches = Batches(len(images), config.optim.batch_size, config.seed, 0, train, part, weights)
        self.kept, self.images = kept, images
        self.seed, self.hflip = config.seed, config.dataset.hflip if train else 0.0

    def __iter__(self) -> Iterator[tuple[Features, Tensor]]:
        for batch in self._batches:
            rows = [key[1] * (1 + self.kept.mirrored) + self._mirrors(key) for key in batch]
            yield self.kept.batch(rows), default_collate([self.images.target(key[1]) for key in batch])

    def _mirrors(self, key: tuple[int, ...]) -> bool:
        return self.hflip > 0 and mirrors(self.seed, key, self.hflip)


def mirrors(seed: int, key: tuple[int, ...], probability: float) -> bool:
    """Returns whether v2.RandomHorizontalFlip mirrors this image: the one random draw of a transform without a crop.

    key: (epoch, index), see data.batches.Batches.
    """
    generator = torch.Generator().manual_seed(data.mix(seed, *key))
    return torch.rand(1, generator=generator).item() < probability


@dataclass
class Cache:
    """Holds the files of a run, by split."""

    kept: dict[str, Kept]
    peak_mib: float | None  # measured on CUDA, of the forward passes that fill them

    def loader(self, run: Run, split: str, train: bool, part: tuple[int, int]) -> FeatureLoader:
        weights = run.sampling if train else None
        return FeatureLoader(self.kept[split], getattr(run.splits, split), run.config, train, part, weights)


def fill_size(config: DictConfig) -> int:
    """Returns the number of images in a forward pass that fills a file."""
    return min(IMAGES, config.optim.micro_batch or config.optim.batch_size)


def filling_step(config: DictConfig, attached: Attachment, device: torch.device) -> Step:
    """Returns the step whose forward pass computes features: in stock PyTorch, as nothing is kept without gradients."""
    return Step(replaced(config, {"quant": asdict(REFERENCE)}), device, attached)


def is_filled(run: Run, features: Features) -> bool:
    """Tells whether all files of a run are there, of rows like these features."""
    fields = [(tuple(t.shape[1:]), t.dtype) for t in features.tensors]
    return all(kept.whole() for kept in _files(run, _folder(run), fields).values())


def _folder(run: Run) -> Path:
    return data.data_folder(run.config.dataset).parent / "taps"


def opened(run: Run) -> Cache:
    """Returns the files of a run, filled where they are missing or damaged.

    The model is left on the CPU, its feature head on the device. Raises UserError where the folder can't be written to,
    RunError where the disk has not the room, KeyboardInterrupt when it is asked to stop; what was there before stays,
    what was begun does not.
    """
    config, head, model, device = run.config, run.feature_head, run.model, run.device
    assert head is not None
    step = filling_step(config, run.attached, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    @torch.no_grad()
    def read(images: Tensor, whole: bool = False) -> tuple[Features, Tensor]:
        return head.capture(lambda: step.logits(model, images.to(device)), whole)

    model.eval()
    loaded = data.build_transform(run.backbone.image, config.dataset, train=False, normalise=False)
    few = run.splits.train.subset(range(min(fill_size(config), len(run.splits.train))))
    images, _ = next(iter(data.loader(few, loaded, len(few), workers=0)))
    # Also where nothing is to be filled: for the measured peak, and as a check.
    features, logits = read(images, whole=True)
    with torch.no_grad():
        if not _close(Features([step.logits(head, features)]), Features([logits])):
            raise UserError(
                f"dataset.cache=features: the logits of {type(model).__name__} are not what its head returns"
            )
    folder = _folder(run)
    kept = _files(run, folder, [(tuple(t.shape[1:]), t.dtype) for t in features.tensors])
    train = kept["train"]
    if train.whole() and not _close(train.batch(range(0, train.rows, 1 + train.mirrored)[: len(few)]), features):
        for one in kept.values():  # other figures than those of this model
            one.discard()
    missing = {split: one for split, one in kept.items() if not one.whole()}
    size = f"{sum(one.bytes for one in kept.values()) / MIB:,.1f} MiB"
    if missing:
        need = sum(one.bytes for one in missing.values())
        print(
            f"dataset.cache=features: {size} for {sum(one.rows for one in kept.values())} images and mirror images in"
            f" {folder}",
            flush=True,
        )
        _room(folder, need)
        for split, one in missing.items():
            _fill(run, split, one, read)
    else:
        print(f"dataset.cache=features: {size}, there already, in {folder}", flush=True)
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / MIB
        model.to("cpu")
        head.to(device)
        torch.cuda.empty_cache()
    return Cache(kept, peak)


def _close(one: Features, two: Features) -> bool:
    """Returns whether two batches are equal up to the rounding of other kernels."""
    pairs = zip(one.tensors, two.tensors, strict=True)
    return all(
        (a.float() - b.cpu().float()).abs().max() <= 0.02 * b.float().abs().max().cpu()
        for a, b in ((a.cpu(), b) for a, b in pairs)
    )


def _files(run: Run, folder: Path, fields: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Kept]:
    config, head = run.config, run.feature_head
    assert head is not None
    settings = {key: value for key, value in plain(config.dataset).items() if key not in ELSEWHERE}
    key = {
        "schema": SCHEMA,
        "user": os.getuid() if hasattr(os, "getuid") else 0,  # in a shared folder each has files of their own
        "data": [run.splits.revision, settings],
        "backbone": [
            config.backbone.timm,
            OmegaConf.to_container(config.backbone.kwargs),
            AS_FP32.get(config.backbone.weights, config.backbone.weights),
            run.weights,
        ],
        "image": asdict(run.backbone.image),
        "reads": head.about,
        "precision": [config.precision, run.device.type],
        "versions": [torch.__version__, torchvision.__version__, timm.__version__, PIL.__version__],
    }
    kept = {}
    for split in ("train", "val", *(["test"] if config.test else [])):
        images, mirrored = len(getattr(run.splits, split)), split == "train" and config.dataset.hflip > 0
        kept[split] = Kept(folder, key | {"split": split}, images, mirrored, fields)
    return kept


def _room(folder: Path, need: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(there).free) < need:
        raise RunError(
            f"dataset.cache=features: needs {need / MIB:,.0f} MiB in {folder}, where {free / MIB:,.0f} MiB are free;"
            " make room, point S2A_DATA to another disk, or set dataset.cache=null"
        )


def _fill(run: Run, split: str, kept: Kept, read: Callable[[Tensor], tuple[Features, Tensor]]) -> None:
    images, config = getattr(run.splits, split), run.config
    with lock(kept.path.parent, kept.path.name):
        if kept.whole():  # by now: another run was at it
            return
        for litter in kept.path.parent.glob(f".{kept.path.name}.????????"):  # of a process that was killed
            litter.unlink(missing_ok=True)
        transform = data.build_transform(run.backbone.image, config.dataset, train=False, normalise=False)
        loader = data.loader(
            images, transform, fill_size(config), workers=config.workers, pin_memory=run.device.type == "cuda"
        )
        with Progress(f"dataset.cache=features, {split}", len(images), " images") as progress, stopping() as asked:

            def batches() -> Iterator[list[Features]]:
                for batch, _ in guarded(loader, asked):
                    yield [read(view)[0] for view in ((batch, batch.flip(-1)) if kept.mirrored else (batch,))]
                    progress.add(len(batch))
                    if asked():
                        raise KeyboardInterrupt

            try:
                kept.write(batches())
            except OSError as error:
                raise RunError(
                    f"dataset.cache=features: {kept.path} can't be written ({error.strerror}): it takes"
                    f" {kept.bytes / MIB:,.0f} MiB; make room, point S2A_DATA to another disk, or set"
                    " dataset.cache=null"
                ) from None
