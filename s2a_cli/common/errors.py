"""The one exception that means "the input was wrong"; the command line prints it as one line and exits with 2."""

import difflib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

SHOWN = ("Zs", "Co", "Cn")  # kinds of characters that isprintable() refuses, and that are harmless
JOINERS = "\u200c\u200d"  # within words of some languages, and emoji


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, and what would be right."""

    code = 2  # that the process exits with

    def __init__(self, message: str):
        # Names come from files that others made: what could end a line or move a cursor is shown as an escape.
        super().__init__("\n".join(map(printable, message.split("\n"))))


def nearest(word: str, accepted: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the accepted word closest to `word`, or an empty string."""
    match = len(word) <= 100 and difflib.get_close_matches(word, list(accepted), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def brief(text: str, most: int = 100) -> str:
    """The text, or its beginning with dots behind it, on one line."""
    shown = printable(text, most)
    return shown if len(text) <= most else f"{shown[: most - 3]}..."


def is_there(path: Path) -> bool:
    """As path.exists(), and False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def printable(text: str, most: int | None = None) -> str:
    """The text, at most so many characters of it, with control characters, which could end a line or move a terminal's
    cursor, as escapes.
    """
    text = text[:most]
    if text.isprintable():
        return text
    shown = (one.isprintable() or one in JOINERS or unicodedata.category(one) in SHOWN for one in text)
    return "".join(one if is_shown else ascii(one)[1:-1] for one, is_shown in zip(text, shown, strict=True))[:most]


def first_line(error: BaseException, most: int = 160) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__), most)


class RunError(Exception):
    """A run failed for a reason that one line can tell; exit code 1."""
