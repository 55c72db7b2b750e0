"""Figures of a classifier on a labelled split, in %, from what it answered for every image."""

from __future__ import annotations

import numpy as np


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float | None:
    """Returns the mean over classes of the average precision, in %; None where no image has a label.

    scores: [images, classes], larger for a class that is more likely. targets: [images, classes] of 0 and 1. A class
    without an image is left out. The average precision is the sum of the precision at each rank that raises the recall,
    times by how much it does (scikit-learn's, without interpolation).
    """
    from sklearn.metrics import average_precision_score  # takes a second to import

    present = targets.any(axis=0)
    if not present.any():
        return None
    return 100 * float(average_precision_score(targets[:, present], scores[:, present], average="macro"))
