"""Defines the exceptions whose message is all that a user needs: it is printed without a traceback."""

from s2a_cli.common.text import printable


class UserError(Exception):
    """Means that the input was wrong; the process exits with 2.

    The message says what was wrong, and what would be right, in a line for each problem.
    """

    code = 2

    def __init__(self, message: str):
        # Names come from files that others made: what could end a line or move a cursor is shown as an escape.
        super().__init__("\n".join(map(printable, message.split("\n"))))


class RunError(Exception):
    """Means that a run failed for a reason that one line can tell; the process exits with 1."""
