"""Weighs classes, and images, so that rare classes count as much as frequent ones (`optim.balance`)."""

from __future__ import annotations

import numpy as np

from s2a_cli.data.images import Images


def class_weights(images: Images, classes: int) -> np.ndarray:
    """Returns what each class counts in the loss, [classes] float64; 1 for a class without an image.

    One label an image: images / (classes that occur * images of the class), whose mean over the images is 1. Several
    labels: images without the class / images with it, the weight of the positive examples in binary cross-entropy.
    """
    counts = images.counts(classes).astype(np.float64)
    present = counts > 0
    weights = np.ones(classes)
    if images.classes is None:
        weights[present] = len(images) / (present.sum() * counts[present])
    else:
        weights[present] = np.maximum(len(images) - counts[present], 1) / counts[present]
    return weights


def image_weights(images: Images, classes: int) -> np.ndarray:
    """Returns what the chance that an image is drawn is in proportion to, [images] float64.

    One label an image: 1 / the images of its class. Several labels: of its rarest class; without a label, of those
    that have none either.
    """
    counts = images.counts(classes)
    if images.classes is None:
        return 1 / counts[np.asarray(images.labels)]
    unlabelled = sum(not labels for labels in images.labels)
    return np.array([1 / min((counts[label] for label in labels), default=unlabelled) for labels in images.labels])
