"""Is a difference more than noise? Runs are compared in pairs that differ in nothing but what is compared.

A pair is one data set, one seed and, wherever they vary, one batch size, precision, ... Their differences go into a
paired t-test, two-sided at 5 %; where several rows are compared with one, Holm's step-down correction keeps the chance
of any false win at 5 % (Holm 1979, A simple sequentially rejective multiple test procedure).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import cast

import pandas as pd

from s2a_cli.results.aggregate import Differences
from s2a_cli.results.formats import label
from s2a_cli.results.frames import column, grouped, where

LEVEL = 0.05
LEAST = 3  # pairs that a test needs


@dataclass(frozen=True)
class Difference:
    """What paired values differ by."""

    mean: float
    error: float  # standard error of the mean
    n: int  # pairs
    p: float  # nan: too few pairs


def pairs_of(differences: Differences, contender: list[str], cols: list[str], rows: list[str]) -> pd.DataFrame:
    """Returns the runs as pairs: a line a pair, a column a label of `rows`, a cell the mean of the runs' "value".

    The index holds what pairs agree in, see Differences.pairing, and the labels of `cols`.
    """
    runs = differences.rows
    agree = [column(runs, name).map(label).rename(f"_{name}") for name in differences.pairing(contender)]
    values = grouped(column(runs, "value"), [*agree, *(column(runs, key) for key in [*cols, *rows])]).mean()
    wide: pd.DataFrame = values.unstack(rows)
    wide.columns = [name if isinstance(name, tuple) else (name,) for name in wide.columns]
    return wide


def within(pairs: pd.DataFrame, key: str, wanted: Iterable[str]) -> pd.DataFrame:
    """Returns the pairs whose `key` is one of the wanted."""
    return where(pairs, pairs.index.get_level_values(key).isin(list(wanted)))


def values_of(pairs: pd.DataFrame, name: Hashable | None) -> pd.Series:
    """Returns a column of the pairs, nan in every line where there is no such column."""
    if name is None or name not in pairs:
        return pd.Series(math.nan, pairs.index, dtype=float)
    return cast(pd.Series, pairs[name])


def difference(values: pd.Series, others: pd.Series) -> Difference:
    """Returns values - others, paired by index; pairs with a missing side don't count."""
    gaps = (values - others).dropna()
    n, spread = len(gaps), float(cast(float, gaps.std()))
    return Difference(gaps.mean() if n else math.nan, spread / math.sqrt(n) if n > 1 else math.nan, n, _p(gaps))


def _p(gaps: pd.Series) -> float:
    n, mean, spread = len(gaps), float(gaps.mean()), float(cast(float, gaps.std()))
    if n < LEAST:
        return math.nan
    if spread < 1e-9 * max(1.0, abs(mean)):  # all the same: no t; the sign test then
        return 1.0 if abs(mean) < 1e-9 else min(1.0, 2 * 0.5**n)
    from scipy.special import stdtr  # Student's distribution, as in scipy.stats, which takes a second to import

    return 2 * float(stdtr(n - 1, -abs(mean) / (spread / math.sqrt(n))))


def holm(ps: Iterable[float]) -> list[float]:
    """Returns p values, corrected for their number; nan stays nan and is not counted."""
    ps = list(ps)
    order = sorted((p, index) for index, p in enumerate(ps) if not math.isnan(p))
    corrected, highest = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[index] = highest
    return corrected


def verdict(p: float) -> str:
    """Returns "" for a difference, "≈" for none that can be told from noise, "?" for too few pairs to tell."""
    return "?" if math.isnan(p) else "≈" if p >= LEVEL else ""


def leaders(pairs: pd.DataFrame, means: pd.Series, better: int) -> dict:
    """Returns marks for the columns of `pairs`: {best: "best" + verdict, others: verdict}.

    pairs: a line a pair, a column a contender. means: the figure of each contender that is shown. better: 1 up, -1
    down.
    """
    means = means.dropna()
    if len(means) < 2:
        return {}
    best = (means * better).idxmax()
    others = [name for name in means.index if name != best]
    found = [difference(values_of(pairs, best), values_of(pairs, name)) for name in others]
    ps = holm(d.p for d in found)
    # The pairs may be fewer than the runs behind the means: where they point the other way, nothing is told apart.
    marks = [verdict(max(p, float(d.mean * better <= 0)) if d.p == d.p else p) for p, d in zip(ps, found, strict=True)]
    if set(marks) == {"?"}:
        return {best: "best?"}
    weakest = "≈" if "≈" in marks else "?" if "?" in marks else ""
    return {best: "best" + weakest} | dict(zip(others, marks, strict=True))
