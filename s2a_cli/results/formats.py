"""Tables of text in the formats that people read or paste: terminal, Markdown, LaTeX, HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

import pandas as pd

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest
from s2a_cli.results.frames import is_missing
from s2a_cli.results.made_files import safe_cell

FORMATS = ("terminal", "md", "csv", "latex", "html")
ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
ESCAPED |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
ESCAPED |= {
    "±": r"$\pm$",
    "–": "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≈": r"$\approx$",
    "†": r"\dag{}",
    "−": "$-$",
}
STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif;
       margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #8885 }
.right { text-align: right; font-variant-numeric: tabular-nums }
</style>"""


@dataclass(frozen=True)
class TextTable:
    """A table of texts, as it is printed."""

    text: pd.DataFrame
    right: set[str]  # columns that are aligned to the right
    bold: set[tuple[int, str]] = field(default_factory=set)  # (line, column) of the best
    title: str = ""


def check_format(format: str) -> str:
    """Returns the format of a table. Raises UserError for one that is not in FORMATS."""
    if format not in FORMATS:
        raise UserError(f"format={format}: expected one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    return format


def number(value: float, digits: int, suffix: str = "") -> str:
    """Returns a figure with so many decimals, a dash for nan."""
    return "–" if pd.isna(value) else f"{value:,.{digits}f}{suffix}"


def mib(value: float) -> str:
    """Returns a figure with one decimal, none from 100 on, a dash for nan."""
    return number(value, 1 if pd.isna(value) or value < 100 else 0)


def cell(value: object) -> str:
    """Returns a setting as it stands in a table of settings, a dash for a missing one."""
    return "–" if is_missing(value) else f"{value:.10g}" if isinstance(value, float) else str(value)


def label(value: object) -> str:
    """Returns a setting as users type it: null, true, 0.001."""
    if is_missing(value):
        return "null"
    return (
        f"{value:.10g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def render(tables: list[TextTable], notes: list[str], format: str) -> str:
    """Returns the tables with the notes under them, in one of FORMATS but csv, which holds numbers and not texts."""
    if format == "latex":
        return "\n\n".join([*map(_latex, tables), "\n".join(f"% {note}" for note in notes)])
    if format == "html":
        said = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
        return (
            f"<!doctype html>\n<meta charset=utf-8>\n<title>s2a</title>\n{STYLE}\n"
            + "\n".join(map(_html, tables))
            + f"\n{said}"
        )
    style = {"md": "github", "terminal": "simple"}[format]
    printed = []
    for table in tables:
        text = _marked(table, "**{}**" if format == "md" else "*{}")
        if format == "md":
            text = text.map(lambda value: value.replace("|", "\\|"))
        align = ["right" if column in table.right else "left" for column in text]
        drawn = text.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
        printed.append(f"{table.title}\n\n{drawn}" if table.title else drawn)
    return "\n\n".join([*printed, "\n".join(notes) if format == "terminal" else "  \n".join(notes)])


def as_csv(rows: pd.DataFrame) -> str:
    """Returns the rows as CSV, with cells as `safe_cell` makes them."""
    return rows.map(safe_cell).rename(columns=safe_cell).to_csv(index=False).rstrip("\n")


def _marked(table: TextTable, mark: str) -> pd.DataFrame:
    text = table.text.astype(object)
    for line, column in table.bold:
        text.iat[line, text.columns.get_loc(column)] = mark.format(text.iat[line, text.columns.get_loc(column)])
    return text


def _tex(text: str) -> str:
    return "".join(ESCAPED.get(character, character) for character in text)


def _latex(table: TextTable) -> str:
    """Returns a booktabs tabular with escaped texts; the document needs \\usepackage{booktabs}."""
    text = table.text.map(_tex).rename(columns=_tex)
    text = _marked(TextTable(text, set(), {(line, _tex(column)) for line, column in table.bold}), r"\textbf{{{}}}")
    align = "".join("r" if column in table.right else "l" for column in table.text)
    title = f"% {table.title}\n" if table.title else ""
    return title + text.to_latex(index=False, escape=False, column_format=align).rstrip("\n")


def _html(table: TextTable) -> str:
    def line(tag: str, values: list[str]) -> str:
        pairs = zip(values, table.text, strict=True)
        cells = (f"<{tag}{' class=right' if column in table.right else ''}>{value}</{tag}>" for value, column in pairs)
        return f"<tr>{''.join(cells)}</tr>"

    escaped = TextTable(table.text.map(html.escape), table.right, table.bold)
    body = [line("td", list(row)) for row in _marked(escaped, "<b>{}</b>").itertuples(index=False)]
    title = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    return (
        f"{title}<table>\n<thead>{line('th', [html.escape(c) for c in table.text])}</thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table>"
    )
