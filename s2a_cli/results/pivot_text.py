"""A grid as texts: the table itself, and the one of differences to a reference."""

from __future__ import annotations

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed, nearest
from s2a_cli.results import pivot, published, summary
from s2a_cli.results.formats import Sheet, as_csv, cell, checked, mib, number, render
from s2a_cli.results.pivot import Grid, Mean
from s2a_cli.results.significance import LEAST, difference, holm, verdict

ARROWS = {1: " ↑", -1: " ↓"}
TESTED = (
    "Paired t-test over {over}, two-sided at 5 %, corrected for the number of rows (Holm); the noise of seeds, not that"
    " of the choice of test images. ≈: not told apart from the {best}.{few}"
)
FEW = f" ?: fewer than {LEAST} pairs, nothing can be told."
PREDICTED = "~: predicted, not measured."


def _figure(grid: Grid, line: tuple[str, ...], column: tuple[str, ...], counts: bool) -> str:
    at = pivot._at(line, column)
    if at not in grid.cells.index:
        return "–"
    found = grid.cells.loc[at]
    if not found["n"]:
        return found["state"] if found["state"] != "ok" else "–"
    predicted = "~" if grid.value.column in pivot.MEASURABLE and found["kind"] == "predicted" else ""
    text = predicted + number(found["mean"], grid.value.digits)
    if pd.notna(found["std"]) and grid.value.noisy:
        text += f" ± {found['std']:.{grid.value.digits}f}"
    return text + (f" ({found['n']})" if counts else "") + ("†" if found["mixed"] else "") + _suffix(found["mark"])


def _tilde(grid: Grid, line: tuple[str, ...]) -> str:
    """What stands before a row's means: "~" where a predicted figure is among its cells."""
    if grid.value.column not in pivot.MEASURABLE:
        return ""
    row = grid.cells.loc[line if len(line) > 1 else line[0], "kind"]
    return "~" if "predicted" in ([row] if isinstance(row, str) else list(row)) else ""


def _suffix(mark: str) -> str:
    mark = mark.removeprefix("best")
    return f" {mark}" if mark else ""


def _range(values: pd.Series, text) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    low, high = text(values.min()), text(values.max())
    return low if low == high else f"{low} to {high}"


def _extras(grid: Grid, line: tuple[str, ...]) -> dict[str, str]:
    """Trainable parameters and peak memory of a row's runs, over all its columns."""
    runs = grid.runs[grid.runs["value"].notna()]
    for key, name in zip(grid.rows, line, strict=True):
        runs = runs[runs[key] == name]
    if (runs["kind"] == "measured").any():
        runs = runs.assign(**{"memory.peak_mib": runs["memory.peak_mib"].where(runs["kind"] == "measured")})
    predicted = "" if (runs["kind"] == "measured").any() else "~"
    peak = _range(pd.to_numeric(runs["memory.peak_mib"]), mib)
    return {
        "trainable M ↓": _range(pd.to_numeric(runs["parameters.trainable"]) / 1e6, lambda value: number(value, 3)),
        "peak MiB ↓": peak if peak == "–" else predicted + peak,
    }


def sheet(grid: Grid) -> tuple[Sheet, list[str]]:
    """The grid's table, and the notes under it."""
    lines, columns = grid.lines(), grid.columns()
    counts = grid.cells.loc[grid.cells["n"] > 0, "n"].nunique() > 1
    extras = grid.value.title == pivot.VALUES["test_top1"].title and not grid.transposed
    records, bold = [], set()
    for number_of, line in enumerate(lines):
        record = dict(zip(grid.rows, line, strict=True))
        for column in columns:
            title = " / ".join(column) or grid.value.title + ARROWS[grid.value.better]
            record[title] = _figure(grid, line, column, counts)
            at = pivot._at(line, column)
            if at in grid.cells.index and grid.cells.loc[at, "mark"].startswith("best"):
                bold.add((number_of, title))
        for mean in grid.means:
            mark = grid.marks.get((line, mean.title), "")
            record[mean.title] = (
                _tilde(grid, line) + number(pivot.mean_of(grid, line, mean), grid.value.digits) + _suffix(mark)
            )
            if mark.startswith("best"):
                bold.add((number_of, mean.title))
        records.append(record | (_extras(grid, line) if extras else {}))
    text = pd.DataFrame(records)
    notes = _notes(grid, counts, extras, text)
    if grid.transposed:
        return _transposed(grid, text, bold), notes
    return Sheet(text, set(text.columns) - set(grid.rows), bold), notes


def _transposed(grid: Grid, text: pd.DataFrame, bold: set[tuple[int, str]]) -> Sheet:
    heads = [" / ".join(line) for line in grid.lines()]
    body = text.drop(columns=grid.rows)
    turned = body.T.set_axis(heads, axis=1).reset_index(names=" / ".join(grid.cols))
    places = {title: place for place, title in enumerate(body)}
    return Sheet(turned, set(heads), {(places[title], heads[line]) for line, title in bold})


def _notes(grid: Grid, counts: bool, extras: bool, text: pd.DataFrame) -> list[str]:
    notes = [f"{grid.value.title}{ARROWS[grid.value.better]}: mean"]
    notes[0] += " ± standard deviation" if grid.value.noisy else ""
    ns = sorted(set(grid.cells.loc[grid.cells["n"] > 0, "n"]))
    notes[0] += (
        " over the (n) runs of a cell." if counts else f" over n = {ns[0] if ns else 0} run{'s'[: ns != [1]]} a cell."
    )
    marks = {*grid.cells["mark"], *grid.marks.values()} - {""}
    if marks:
        notes.append("Bold (* in the terminal): best" + _among(grid) + ".")
    if grid.value.noisy and marks:
        over = "seeds" + (" and data sets" if grid.means else "")
        few = any("?" in mark for mark in marks)
        notes.append(TESTED.format(over=over, best="best", few=FEW if few else "") + f" Pairs: {_pairs(grid)}.")
    if grid.cells["mixed"].any():
        notes.append(
            "†: a mean over unlike runs: what differs is named below; add it to rows=, or keep one with key=value."
        )
    if extras:
        notes.append("trainable: head apart. peak: memory of a training step.")
    if text.map(lambda value: isinstance(value, str) and value.startswith("~")).any(axis=None):
        notes.append(PREDICTED)
    if incomplete := [
        line for line in grid.lines() if any(pd.isna(pivot.mean_of(grid, line, mean)) for mean in grid.means)
    ]:
        names = [f"{' / '.join(line)} lacks {listed(_lacking(grid, line, grid.means[-1]), 4)}" for line in incomplete]
        notes.append(f"–: no mean where a data set is missing: {listed(names, 4)}.")
    return [*map(str.strip, notes), *grid.notes]


def _among(grid: Grid) -> str:
    return " of a row" if grid.transposed else " of a column"


def _pairs(grid: Grid) -> str:
    """How many pairs the tests had: complete lines of the grid's pairs, for each column."""
    if not grid.cols:
        return f"at most {len(grid.pairs)}"
    counts = grid.pairs.notna().sum(axis=1).ge(2).groupby(level=grid.cols).sum()
    low, high = int(counts.min()), int(counts.max())
    return f"{low if low == high else f'{low} to {high}'} a column" + (
        f", {int(counts.sum())} in the mean" if grid.means else ""
    )


def _lacking(grid: Grid, line: tuple[str, ...], mean: Mean) -> list[str]:
    return [d for d in mean.datasets if pd.isna(grid.cells["mean"].get((*line, d), float("nan")))]


def against_reference(grid: Grid, reference: str) -> tuple[Sheet, list[str]]:
    """Each row's mean paired difference to the reference, with its standard error and number of pairs.

    reference: the row's label, its keys joined by commas, without a backbone or data set. Raises UserError for no such
    row.
    """
    named = {
        line: ",".join(x for k, x in zip(grid.rows, line, strict=True) if k in grid.contender) for line in grid.lines()
    }
    if reference not in named.values():
        there = sorted(set(named.values()))
        raise UserError(
            f"reference={reference}: no such row; expected one of {', '.join(there)}{nearest(reference, there)}"
        )
    scopes = [(" / ".join(column), list(zip(grid.cols, column, strict=True))) for column in grid.columns() if column]
    scopes += [("all pairs", [])] if len(scopes) != 1 else []
    records = [dict(zip(grid.rows, line, strict=True)) for line in grid.lines()]
    few = False
    for title, chosen in scopes:
        pairs = grid.pairs
        for key, name in chosen:
            pairs = pivot.within(pairs, key, [name])
        found = []
        for line, name in named.items():
            base = next(
                other for other, label in named.items() if label == reference and grid.task(other) == grid.task(line)
            )
            found.append(None if name == reference else difference(_of(pairs, line), _of(pairs, base)))
        ps = iter(holm(d.p for d in found if d))
        for record, line, d in zip(records, named, found, strict=True):
            mean = _tilde(grid, line) + number(_of(pairs, line).mean(), grid.value.digits)
            mark = verdict(next(ps)) if d and grid.value.noisy else ""
            few |= mark == "?"
            record[title] = f"{mean}" if d is None else _difference(grid, mean, d, mark)
    text = pd.DataFrame(records)
    agreed = f"± its standard error, and the number of pairs (same {', '.join(_agreed(grid))})."
    notes = [
        f"{grid.value.title}{ARROWS[grid.value.better]}: mean of the runs that pair; in brackets the mean difference to"
        f" {reference} {agreed}"
    ]
    if grid.value.noisy:
        notes.append(TESTED.format(over="seeds and data sets", best="reference", few=FEW if few else ""))
    if any(_tilde(grid, line) for line in grid.lines()):
        notes.append(PREDICTED)
    return Sheet(text, set(text.columns) - set(grid.rows), title=f"Against {reference}"), [*notes, *grid.notes]


def _of(pairs: pd.DataFrame, line: tuple[str, ...]) -> pd.Series:
    return pairs[line] if line in pairs else pd.Series(dtype=float)


def _difference(grid: Grid, mean: str, d, mark: str) -> str:
    if not d.n:
        return f"{mean} (no pairs)"
    error = f" ± {d.error:.{grid.value.digits}f}" if pd.notna(d.error) else ""
    return f"{mean} ({d.mean:+.{grid.value.digits}f}{error}, {d.n}){' ' * bool(mark)}{mark}"


def _agreed(grid: Grid) -> list[str]:
    return list(dict.fromkeys(name.removeprefix("_").removeprefix("config.") for name in grid.pairs.index.names))


def csv(grid: Grid) -> str:
    """One line a cell, numbers and not texts."""
    cells = grid.cells.reset_index().rename(columns={"state": "status", "kind": "memory", "mixed": "unlike_runs"})
    cells.insert(len(grid.rows) + len(grid.cols), "value", next(k for k, v in pivot.VALUES.items() if v is grid.value))
    order = sorted(
        range(len(cells)), key=lambda i: pivot._order(tuple(map(cell, cells.iloc[i][grid.rows + grid.cols])))
    )
    return as_csv(cells.iloc[order])


def show(frame: pd.DataFrame, options: dict[str, str]) -> str:
    """What `s2a table` prints of the runs in `frame` under its options. Raises UserError for a wrong one."""
    format = checked(options.get("format", "terminal"))
    if not set(options) & {"rows", "cols", "value", "groups", "against", "reference"}:
        rows = summary.table(frame)
        return summary.render(
            rows, format, pivot.Hidden.of_environment(frame).notes(["method", "quant", "dataset", "backbone"])
        )
    keys = {
        word: [key for key in options.get(word, default).split(",") if key]
        for word, default in _default(frame, options).items()
    }
    if not keys["rows"]:
        raise UserError("rows=: expected keys such as rows=method,quant")
    grid = pivot.make(frame, keys["rows"], keys["cols"], options.get("value", "test_top1"), options.get("groups"))
    if format == "csv":
        return csv(grid)
    first, notes = against_reference(grid, options["reference"]) if "reference" in options else sheet(grid)
    found = [first]
    if "against" in options:
        second, cited = published.compare(grid, published.load(options["against"]))
        found, notes = [*found, *([second] if second else [])], notes + cited
    return render(found, notes, format)


def _default(frame: pd.DataFrame, options: dict[str, str]) -> dict[str, str]:
    """rows: what varies among backbone, method and quant, less what cols has; cols: the data set."""
    runs = summary.unique(frame)
    cols = "" if "dataset" in options.get("rows", "").split(",") else "dataset"
    taken = options.get("cols", cols).split(",")
    vary = [key for key in ("backbone", "method", "quant") if runs[key].nunique() > 1 and key not in taken]
    return {"rows": ",".join(vary) or "method", "cols": cols}
