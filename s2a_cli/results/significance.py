"""Is a difference more than noise? Runs are compared in pairs that differ in nothing but what is compared.

A pair is one data set, one seed and, wherever they vary, one batch size, precision, ... Their differences go into a
paired t-test, two-sided at 5 %; where several rows are compared with one, Holm's step-down correction keeps the chance
of any false win at 5 % (Holm 1979, A simple sequentially rejective multiple test procedure).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

LEVEL = 0.05
LEAST = 3  # pairs that a test needs


@dataclass(frozen=True)
class Difference:
    """Of paired values: their mean difference, its standard error, the number of pairs and the p value (nan: too few
    pairs).
    """

    mean: float
    error: float
    n: int
    p: float


def difference(values: pd.Series, others: pd.Series) -> Difference:
    """values - others, paired by index; pairs with a missing side don't count."""
    gaps = (values - others).dropna()
    n = len(gaps)
    error = gaps.std() / math.sqrt(n) if n > 1 else math.nan
    return Difference(gaps.mean() if n else math.nan, error, n, _p(gaps))


def _p(gaps: pd.Series) -> float:
    n, mean, spread = len(gaps), gaps.mean(), gaps.std()
    if n < LEAST:
        return math.nan
    if spread < 1e-9 * max(1.0, abs(mean)):  # all the same: no t; the sign test then
        return 1.0 if abs(mean) < 1e-9 else min(1.0, 2 * 0.5**n)
    from scipy.special import (
        stdtr,
    )  # Student's distribution; as scipy.stats.ttest_1samp, which takes a second to import

    return 2 * float(stdtr(n - 1, -abs(mean) / (spread / math.sqrt(n))))


def holm(ps: Iterable[float]) -> list[float]:
    """p values, corrected for their number; nan stays nan and is not counted."""
    ps = list(ps)
    order = sorted((p, index) for index, p in enumerate(ps) if not math.isnan(p))
    corrected, highest = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[index] = highest
    return corrected


def verdict(p: float) -> str:
    """ "" for a difference, "≈" for none that can be told from noise, "?" where too few pairs were there to tell."""
    return "?" if math.isnan(p) else "≈" if p >= LEVEL else ""


def leaders(pairs: pd.DataFrame, means: pd.Series, better: int) -> dict:
    """Marks for the columns of `pairs`: {best: "best" + verdict, others: verdict}.

    pairs: a line a pair, a column a contender. means: the figure of each contender that is shown. better: 1 up, -1
    down.
    """
    means = means.dropna()
    if len(means) < 2:
        return {}
    best = (means * better).idxmax()
    others = [label for label in means.index if label != best]
    empty = pd.Series(dtype=float)
    found = [difference(pairs.get(best, empty), pairs.get(label, empty)) for label in others]
    ps = holm(d.p for d in found)
    # The pairs may be fewer than the runs behind the means: where they point the other way, nothing is told apart.
    marks = [verdict(max(p, float(d.mean * better <= 0)) if d.p == d.p else p) for p, d in zip(ps, found, strict=True)]
    if set(marks) == {"?"}:
        return {best: "best?"}
    weakest = "≈" if "≈" in marks else "?" if "?" in marks else ""
    return {best: "best" + weakest} | dict(zip(others, marks, strict=True))
