"""A grid as text: the table itself, and the one of differences to a reference."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed, nearest
from s2a_cli.results import pivot, published, summary
from s2a_cli.results.aggregate import hidden_notes, runs_of, splitting, varying
from s2a_cli.results.formats import TextTable, as_csv, cell, check_format, mib, number, render
from s2a_cli.results.frames import column, columns, grouped, is_missing, numeric, where
from s2a_cli.results.pivot import Grid, Label, Mean, order, place
from s2a_cli.results.significance import LEAST, Difference, difference, holm, values_of, verdict, within

ARROWS = {1: " ↑", -1: " ↓"}
TESTED = (
    "Paired t-test over {over}, two-sided at 5 %, corrected for the number of rows (Holm); the noise of seeds, not that"
    " of the choice of test images. ≈: not told apart from the {best}.{few}"
)
FEW = f" ?: fewer than {LEAST} pairs, nothing can be told."
PREDICTED = "~: predicted, not measured."


def _figure(grid: Grid, line: Label, col: Label, counts: bool) -> str:
    at = place(line, col)
    if at not in grid.cells.index:
        return "–"
    found = grid.cells.loc[at].to_dict()
    if not found["n"]:
        return found["state"] if found["state"] != "ok" else "–"
    predicted = "~" if grid.value.measurable and found["kind"] == "predicted" else ""
    text = predicted + number(found["mean"], grid.value.digits)
    if grid.value.noisy and not is_missing(found["std"]):
        text += f" ± {found['std']:.{grid.value.digits}f}"
    return text + (f" ({found['n']})" if counts else "") + ("†" if found["mixed"] else "") + _suffix(found["mark"])


def _tilde(grid: Grid, line: Label) -> str:
    """Returns what stands before a row's means: "~" where a predicted figure is among its cells."""
    if not grid.value.measurable:
        return ""
    kinds = column(grid.cells, "kind").loc[place(line, ())]
    return "~" if "predicted" in ([kinds] if isinstance(kinds, str) else list(kinds)) else ""


def _suffix(mark: str) -> str:
    mark = mark.removeprefix("best")
    return f" {mark}" if mark else ""


def _range(values: pd.Series, text: Callable[[float], str]) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    low, high = text(values.min()), text(values.max())
    return low if low == high else f"{low} to {high}"


def _extras(grid: Grid, line: Label) -> dict[str, str]:
    """Returns trainable parameters and peak memory of a row's runs, over all its columns."""
    runs = grid.counted(line)
    measured = column(runs, "kind") == "measured"
    peaks = numeric(column(runs, "memory.peak_mib"))
    peak = _range(peaks.where(measured) if any(measured) else peaks, mib)
    trainable = numeric(column(runs, "parameters.trainable")) / 1e6
    return {
        "trainable M ↓": _range(trainable, lambda value: number(value, 3)),
        "peak MiB ↓": peak if peak == "–" or any(measured) else f"~{peak}",
    }


def table(grid: Grid) -> tuple[TextTable, list[str]]:
    """Returns the grid's table, and the notes under it."""
    counts = _counts(grid).nunique() > 1
    extras = grid.value.name in ("test_top1", "test_map") and not grid.transposed
    records, bold = [], set()
    for number_of, line in enumerate(grid.lines()):
        record, best = _record(grid, line, counts)
        bold |= {(number_of, title) for title in best}
        records.append(record | (_extras(grid, line) if extras else {}))
    text = pd.DataFrame(records)
    notes = _notes(grid, counts, extras, text)
    if grid.transposed:
        return _transposed(grid, text, bold), notes
    return TextTable(text, set(text.columns) - set(grid.rows), bold), notes


def _counts(grid: Grid) -> pd.Series:
    """Returns how many runs have the value, of each cell that has any."""
    return column(where(grid.cells, grid.cells["n"] > 0), "n")


def _record(grid: Grid, line: Label, counts: bool) -> tuple[dict[str, str], list[str]]:
    """Returns a row's texts by the titles of their columns, and the titles of those that are the best."""
    record, best = dict(zip(grid.rows, line, strict=True)), []
    marks = column(grid.cells, "mark")
    for col in grid.columns():
        title = " / ".join(col) or grid.value.title + ARROWS[grid.value.better]
        record[title] = _figure(grid, line, col, counts)
        if str(marks.get(place(line, col), "")).startswith("best"):
            best.append(title)
    for mean in grid.means:
        mark = grid.marks.get((line, mean.title), "")
        figure = number(grid.mean_of(line, mean), grid.value.digits)
        record[mean.title] = _tilde(grid, line) + figure + _suffix(mark)
        if mark.startswith("best"):
            best.append(mean.title)
    return record, best


def _transposed(grid: Grid, text: pd.DataFrame, bold: set[tuple[int, str]]) -> TextTable:
    heads = [" / ".join(line) for line in grid.lines()]
    body = text.drop(columns=grid.rows)
    turned = body.T.set_axis(heads, axis=1).reset_index(names=" / ".join(grid.cols))
    places = {title: at for at, title in enumerate(body)}
    return TextTable(turned, set(heads), {(places[title], heads[line]) for line, title in bold})


def _notes(grid: Grid, counts: bool, extras: bool, text: pd.DataFrame) -> list[str]:
    ns = sorted(set(_counts(grid)))
    spread = " ± standard deviation" if grid.value.noisy else ""
    each = f" over n = {ns[0] if ns else 0} run{'s'[: ns != [1]]} a cell."
    over = " over the (n) runs of a cell." if counts else each
    notes = [f"{grid.value.title}{ARROWS[grid.value.better]}: mean{spread}{over}"]
    marks = {*grid.cells["mark"], *grid.marks.values()} - {""}
    if marks:
        notes.append(f"Bold (* in the terminal): best of a {'row' if grid.transposed else 'column'}.")
    if grid.value.noisy and marks:
        over = "seeds" + (" and data sets" if grid.means else "")
        few = any("?" in mark for mark in marks)
        notes.append(TESTED.format(over=over, best="best", few=FEW if few else "") + f" Pairs: {_pairs(grid)}.")
    if any(grid.cells["mixed"]):
        notes.append(
            "†: a mean over unlike runs: what differs is named below; add it to rows=, or keep one with key=value."
        )
    if extras:
        notes.append("trainable: head apart. peak: memory of a training step.")
    if any(isinstance(value, str) and value.startswith("~") for value in text.to_numpy().flat):
        notes.append(PREDICTED)
    lines = grid.lines()
    if incomplete := [line for line in lines if any(is_missing(grid.mean_of(line, mean)) for mean in grid.means)]:
        names = [f"{' / '.join(line)} lacks {listed(_lacking(grid, line, grid.means[-1]), 4)}" for line in incomplete]
        notes.append(f"–: no mean where a data set is missing: {listed(names, 4)}.")
    return [*notes, *grid.notes]


def _pairs(grid: Grid) -> str:
    """Returns how many pairs the tests had: complete lines of the grid's pairs, for each column."""
    if not grid.cols:
        return f"at most {len(grid.pairs)}"
    complete = pd.Series([sum(line) >= 2 for line in grid.pairs.notna().to_numpy()], grid.pairs.index, dtype=bool)
    counts = [int(n) for n in grouped(complete, [complete.index.get_level_values(key) for key in grid.cols]).sum()]
    low, high = min(counts), max(counts)
    each = f"{low if low == high else f'{low} to {high}'} a column"
    return each + (f", {sum(counts)} in the mean" if grid.means else "")


def _lacking(grid: Grid, line: Label, mean: Mean) -> list[str]:
    means = column(grid.cells, "mean")
    return [dataset for dataset in mean.datasets if is_missing(means.get((*line, dataset)))]


def against_reference(grid: Grid, reference: str) -> tuple[TextTable, list[str]]:
    """Returns each row's mean paired difference to the reference, its standard error and number of pairs, and notes.

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
    bases = {grid.task(line): line for line, name in reversed(named.items()) if name == reference}
    scopes = [(" / ".join(col), list(zip(grid.cols, col, strict=True))) for col in grid.columns() if col]
    scopes += [("all pairs", [])] if len(scopes) != 1 else []
    records, few = [dict(zip(grid.rows, line, strict=True)) for line in grid.lines()], False
    for title, chosen in scopes:
        pairs = grid.pairs
        for key, name in chosen:
            pairs = within(pairs, key, [name])
        found = [
            None if name == reference else _paired(pairs, line, bases.get(grid.task(line)))
            for line, name in named.items()
        ]
        ps = iter(holm(d.p for d in found if d))
        for record, line, d in zip(records, named, found, strict=True):
            mean = _tilde(grid, line) + number(values_of(pairs, line).mean(), grid.value.digits)
            mark = verdict(next(ps)) if d and grid.value.noisy else ""
            few |= mark == "?"
            record[title] = mean if d is None else _difference(grid, mean, d, mark)
    text = pd.DataFrame(records)
    right = set(text.columns) - set(grid.rows)
    return TextTable(text, right, title=f"Against {reference}"), _reference_notes(grid, reference, few)


def _paired(pairs: pd.DataFrame, line: Label, base: Label | None) -> Difference:
    return difference(values_of(pairs, line), values_of(pairs, base))


def _reference_notes(grid: Grid, reference: str, few: bool) -> list[str]:
    names = (str(name).removeprefix("_").removeprefix("config.") for name in grid.pairs.index.names)
    notes = [
        f"{grid.value.title}{ARROWS[grid.value.better]}: mean of the runs that pair; in brackets the mean difference to"
        f" {reference} ± its standard error, and the number of pairs (same {', '.join(dict.fromkeys(names))})."
    ]
    if grid.value.noisy:
        notes.append(TESTED.format(over="seeds and data sets", best="reference", few=FEW if few else ""))
    if any(_tilde(grid, line) for line in grid.lines()):
        notes.append(PREDICTED)
    return [*notes, *grid.notes]


def _difference(grid: Grid, mean: str, found: Difference, mark: str) -> str:
    if not found.n:
        return f"{mean} (no pairs)"
    error = "" if is_missing(found.error) else f" ± {found.error:.{grid.value.digits}f}"
    return f"{mean} ({found.mean:+.{grid.value.digits}f}{error}, {found.n}){' ' * bool(mark)}{mark}"


def csv(grid: Grid) -> str:
    """Returns one line a cell, numbers and not texts."""
    cells = grid.cells.reset_index().rename(columns={"state": "status", "kind": "memory", "mixed": "unlike_runs"})
    keys = grid.rows + grid.cols
    cells.insert(len(keys), "value", grid.value.name)
    labels = [tuple(map(cell, line)) for line in columns(cells, keys).itertuples(index=False)]
    return as_csv(cells.iloc[sorted(range(len(cells)), key=lambda at: order(labels[at]))])


def show(frame: pd.DataFrame, options: dict[str, str]) -> str:
    """Returns what `s2a table` prints of the runs in `frame` under its options. Raises UserError for a wrong one."""
    format = check_format(options.get("format", "terminal"))
    if not set(options) & {"rows", "cols", "value", "groups", "against", "reference"}:
        settings = summary.table(frame)
        return summary.render(settings, format, hidden_notes(frame, summary.settings_shown(settings)))
    rows, cols = (_keys(text) for text in _rows_and_cols(frame, options))
    if not rows:
        raise UserError("rows=: expected keys such as rows=method,quant")
    grid = pivot.make(frame, rows, cols, options.get("value"), options.get("groups"))
    if format == "csv":
        return csv(grid)
    first, notes = against_reference(grid, options["reference"]) if "reference" in options else table(grid)
    found = [first]
    if "against" in options:
        second, cited = published.compare(grid, published.load(options["against"]))
        found, notes = [*found, *([second] if second else [])], notes + cited
    return render(found, notes, format)


def _keys(text: str) -> list[str]:
    return [key for key in text.split(",") if key]


def _rows_and_cols(frame: pd.DataFrame, options: dict[str, str]) -> tuple[str, str]:
    """Returns the texts of `rows=` and `cols=`.

    By default rows are what varies among backbone, method and quant, less what cols has, and cols is the data set. Rows
    are split by the other settings in which runs of a cell differ, but not where rows are looked up by name.
    """
    default = "" if "dataset" in options.get("rows", "").split(",") else "dataset"
    cols = options.get("cols", default)
    vary = [key for key in varying(runs_of(frame)) if key not in cols.split(",")] or ["method"]
    if "rows" not in options and not {"reference", "against"} & options.keys():
        vary += splitting(frame, [*vary, *_keys(cols)])
    return options.get("rows", ",".join(vary)), cols
