"""Turns names, errors and figures into text for one line of a message or a table."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

HARMLESS = ("Zs", "Co", "Cn")  # kinds of characters that isprintable() refuses, and that neither end a line nor hide
JOINERS = "\u200c\u200d"  # within words of some languages, and emoji


def printable(text: object, most: int | None = None) -> str:
    """Returns the text, at most `most` characters of it, with control characters as escapes.

    Control characters in a name that others chose could end a line or move a terminal's cursor.
    """
    text = str(text)[:most]
    if text.isprintable():
        return text
    kept = (one.isprintable() or one in JOINERS or unicodedata.category(one) in HARMLESS for one in text)
    return "".join(one if is_kept else ascii(one)[1:-1] for one, is_kept in zip(text, kept, strict=True))[:most]


def utf8(text: str) -> str:
    """Returns the text with escapes for what UTF-8 can't hold, such as bytes of a file's name that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def brief(text: str, most: int = 100) -> str:
    """Returns the text on one line: whole, or its beginning and three dots, `most` characters together."""
    shown = printable(text, most)
    return shown if len(text) <= most else f"{shown[: most - 3]}..."


def nearest(word: str, accepted: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the accepted word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(accepted), n=1) if len(word) <= 100 else []
    return f" (did you mean {match[0]!r}?)" if match else ""


def listed(names: Iterable[object], most: int = 5, separator: str = ", ") -> str:
    """Returns the first names, and how many more there are: `a, b and 3 more`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(printable, names[:most])) + more


def counted(count: int, noun: str) -> str:
    """Returns `1 image`, or `2 images`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def natural(text: str) -> tuple:
    """Returns a key that sorts numbers within texts by their value: blocks.2 before blocks.10.

    No two texts have the same key: 0.005 and 0.0005 hold the same numbers.
    """
    parts = [part for part in re.split(r"(\d+)", text) if part]
    return tuple((0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in parts), text


def first_line(error: BaseException, most: int = 160) -> str:
    """Returns the first line of what an exception says, or its type where it says nothing."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__), most)


def one_line(error: BaseException) -> str:
    """Returns all that an exception says, on one line, or its type where it says nothing."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def type_and_first_line(error: BaseException) -> str:
    """Returns the type of an exception and the first line of what it says: `RuntimeError: out of memory`."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def size(number: float) -> str:
    """Returns a number of bytes to read: 532 B, 14.9 kB, 6.1 GB (powers of 1000, as download pages state them)."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def duration(seconds: float) -> str:
    """Returns a time span to read: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
