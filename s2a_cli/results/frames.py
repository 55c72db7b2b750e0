"""Steps of pandas with the types that its own annotations leave open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """Returns one column; a frame with two columns of this name is a mistake."""
    return cast(pd.Series, frame[name])


def columns(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Returns the columns of these names, in their order."""
    return cast(pd.DataFrame, frame[list(names)])


def where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """Returns the lines at which the mask, a boolean a line, is true."""
    return cast(pd.DataFrame, frame[mask])


def numeric(values: pd.Series) -> pd.Series:
    """Returns the values as numbers, a missing one as nan. Raises ValueError for what is no number."""
    return cast(pd.Series, pd.to_numeric(values))


def is_missing(value: object) -> bool:
    """Returns whether a cell is None, nan, or whatever else pandas holds for a missing value."""
    return bool(pd.isna(cast(Any, value)))


def grouped(values: pd.Series | pd.DataFrame, by: Any, sort: bool = True) -> Any:
    """Returns the values in groups, for what pandas computes of each: mean, nunique, agg, ..."""
    return values.groupby(by, sort=sort)


def groups_of(frame: pd.DataFrame, by: list[str], dropna: bool = True) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Returns (key, lines) of each group, by rising key; the key is a tuple of one value for each column of `by`."""
    return cast(Any, list(frame.groupby(by, dropna=dropna)))


def column_counts(values: pd.Series) -> list[tuple[Any, int]]:
    """Returns (value, how often it is there), the most frequent first."""
    return cast(Any, list(values.value_counts().items()))
