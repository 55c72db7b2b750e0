"""Shows the progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from s2a_cli.common.text import duration, size

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts what is done, on stderr: `with Progress("real.zip", total, "B") as progress: progress.add(n)`.

    The unit "B" counts bytes. `add(n, loss="0.1")` shows a state behind the bar. `note(line, n)` prints a line that
    stays: above the bar on a terminal, elsewhere with the rate and the time left.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0, quiet: bool = False):
        self.title, self.total, self.unit, self.done, self.quiet = title, total, unit, done, quiet
        self._first = done  # by an earlier attempt, and not counted in the rate
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self._start = self._spoke = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            scale = self.unit == "B"
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.title,
                unit=self.unit,
                unit_scale=scale,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, amount: int, **state: str) -> None:
        """Counts `amount` more as done, and prints a line where the last one is SECONDS_BETWEEN_LINES old."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix(state, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._say(self.line(self.seconds))

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self._start

    def note(self, line: str, amount: int = 0) -> None:
        """Counts `amount` more as done, and prints a line that stays."""
        self.done += amount
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
            self._bar.update(amount)
        else:
            self._say(line + self._pace(self.seconds))

    def warn(self, line: str) -> None:
        """Prints a line that stays, also where it is quiet: above the bar on a terminal."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        if self.quiet:
            return
        print(line, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Returns where things stand `seconds` after the start: "real.zip: 1.2 GB of 6.1 GB, 8.3 MB/s, 9 min left"."""
        of = f" of {self._amount(self.total)}" if self.total else ""
        return f"{self.title}: {self._amount(self.done)}{of}{self._pace(seconds)}"

    def _pace(self, seconds: float) -> str:
        """Returns the rate and the time left behind a comma; nothing before anything was done."""
        if self.done == self._first:
            return ""
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if self.total else ""
        seconds_each, unit = (
            (1, "s") if self.unit == "B" or rate >= 1 else (60, "min") if rate >= 1 / 60 else (3600, "h")
        )
        return f", {self._amount(seconds_each * rate)}/{unit}{left}"

    def _amount(self, value: float) -> str:
        return size(value) if self.unit == "B" else f"{value:.0f} {self.unit.strip()}"
