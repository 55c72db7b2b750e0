"""Makes batches whose content is a function of (seed, epoch, index), whatever the number of worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from s2a_cli.common.errors import UserError
from s2a_cli.data.images import ImageArray, Images
from s2a_cli.data.transforms import Transform


class Loader:
    """Iterates over one split in batches (images [B, 3, H, W] as transformed, labels [B] int64), once an epoch.

    Where images have several labels, labels are float32 [B, classes] of 0 and 1.

    Set `epoch` before each pass: the order is a function of (seed, epoch), the augmentation of an image of (seed,
    epoch, index). Set `skip` to leave out the first batches of a pass. Where several processes share each batch, this
    one gets the share of its rank. Torch's global generators stay as they were. Worker processes live as long as the
    loader. Raises UserError with the name of the file when an image cannot be read, which ends the loader.
    """

    def __init__(self, split, transform, batch_size, *, seed, epoch, train, workers, pin_memory, part, weights=None):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is not positive")
        self._batches = Batches(len(split), batch_size, seed, epoch, train, part, weights)
        workers = default_workers(split) if workers is None else workers
        self._loader = DataLoader(
            _Samples(split, transform, seed),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each pass would draw a seed from the global one
        )

    # The sampler keeps these and never refers to the loader: worker processes in a reference cycle end after seconds.
    @property
    def epoch(self) -> int:
        return self._batches.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch

    @property
    def skip(self) -> int:
        return self._batches.skip

    @skip.setter
    def skip(self, batches: int) -> None:
        self._batches.skip = batches

    def size(self, batch: int) -> int:
        """Returns how many images a batch has, over all processes."""
        return min(self._batches.batch_size, self._batches.length - batch * self._batches.batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                del self._loader  # ends the worker processes now, not when the traceback is gone
                raise batch
            yield batch


def loader(
    split: Images,
    transform: Transform,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    train: bool = False,
    workers: int | None = None,
    pin_memory: bool = False,
    part: tuple[int, int] = (0, 1),
    weights: np.ndarray | None = None,
) -> Loader:
    """Returns a `Loader` of `split`.

    train: shuffle, and leave out a last batch of one image, with which BatchNorm can't train, or of fewer images than
    processes. workers: how many processes load images; None for the number of default_workers. part: (rank, number) of
    the processes that share each batch. weights: with train, draws as many images as there are, with replacement, each
    with a probability in proportion to its weight.
    """
    return Loader(
        split,
        transform,
        batch_size,
        seed=seed,
        epoch=epoch,
        train=train,
        workers=workers,
        pin_memory=pin_memory,
        part=part,
        weights=weights,
    )


def default_workers(split: Images) -> int:
    """Returns 0 for images in memory; else one worker process for every two cores, at most 8."""
    if isinstance(split, ImageArray):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 2)


class Batches:
    """A batch sampler that yields lists of (epoch, index): workers outlive an epoch and must know which one it is.

    An image that `weights` have drawn before in the epoch comes as (epoch, index, how often before), and is augmented
    in another way.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        epoch: int,
        train: bool,
        part: tuple[int, int],
        weights: np.ndarray | None = None,
    ):
        self.length, self.batch_size, self.seed, self.epoch, self.train = length, batch_size, seed, epoch, train
        self.rank, self.world = part
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.skip = 0  # batches

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        least = max(2, self.world) if self.train and full else 1  # images of a last batch
        return full + (rest >= least)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, order = self.epoch, range(self.length)
        copies: Sequence[tuple[int, ...]] = [()] * self.length
        if self.train:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            if self.weights is None:
                order = torch.randperm(self.length, generator=generator).tolist()
            else:
                order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
                copies = _copies(order)
        for batch in range(self.skip, len(self)):
            start = batch * self.batch_size
            if mine := range(start, min(start + self.batch_size, self.length))[self.rank :: self.world]:
                yield [(epoch, order[place], *copies[place]) for place in mine]


def _copies(order: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns () for the first time that an index is drawn, (1,) for the second, (2,) for the third."""
    drawn: dict[int, int] = {}
    found = []
    for index in order:
        found.append((drawn[index],) if index in drawn else ())
        drawn[index] = drawn.get(index, 0) + 1
    return found


class _Samples(Dataset):
    """A map-style data set of (transformed image [3, H, W], target), or the UserError of an image that is no image."""

    def __init__(self, split: Images, transform: Transform, seed: int):
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, Any] | UserError:
        index = key[1]
        try:
            image = self.split.image(index, self.transform.at_least)
        except UserError as error:
            return error  # raised from a worker it would arrive wrapped in that worker's traceback
        state = torch.get_rng_state()
        # not torch.manual_seed, which also seeds the accelerators
        torch.default_generator.manual_seed(mix(self.seed, *key))
        try:
            return self.transform(image), self.split.target(index)
        finally:
            torch.set_rng_state(state)


def mix(*numbers: int) -> int:
    """Hashes several integers into a 32-bit seed, as torch's CPU generator takes no more bits."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")


def _collate(samples: list) -> list[Tensor] | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return default_collate(samples)
