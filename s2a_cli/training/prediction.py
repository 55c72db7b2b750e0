"""Classifies photos with a trained model, as many as there are, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from s2a_cli.data import photos
from s2a_cli.data.photos import Photo
from s2a_cli.results.predictions import Prediction
from s2a_cli.training.trained import Trained


def predict(trained: Trained, paths: Iterable[Path], top: int = 5, thumbnails: bool = False) -> Iterator[Prediction]:
    """Yields what the model says of each photo, the `top` most probable classes first, in the order of `paths`.

    Photos are decoded ahead on threads, and go through the model in batches of the run's size, or as large as its
    micro-batches. One that can't be read comes with the reason.
    """
    read = photos.read(paths, trained.transform, trained.config.workers, thumbnails)
    while batch := list(islice(read, trained.config.optim.batch_size)):
        yield from _classified(trained, batch, top)


def _classified(trained: Trained, batch: list[Photo], top: int) -> Iterator[Prediction]:
    """Yields the predictions of one batch."""
    readable = [photo.pixels for photo in batch if photo.pixels is not None]
    found: Iterator[list[tuple[str, float]]] = iter(())
    if readable:
        likely = trained.probabilities(trained(torch.stack(readable))).topk(min(top, len(trained.classes)))
        found = iter(
            [(trained.classes[place], probability) for place, probability in zip(places, probabilities)]
            for places, probabilities in zip(likely.indices.tolist(), likely.values.tolist())
        )
    for photo in batch:
        classes = [] if photo.pixels is None else next(found)
        yield Prediction(photo.path, classes, photo.trouble, photo.thumbnail)
