"""A progress bar with a rate and the time left on a terminal; plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """with Progress(total, unit="image") as p: p.advance(n, epoch="1/10"); p.note("a line above the bar")."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, unit_scale=True, disable=not self.terminal, dynamic_ncols=True)
        self.begun = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self, n: int, **state: str) -> None:
        self.done += n
        self.bar.update(n)
        self.bar.set_postfix(state, refresh=False)

    def note(self, line: str) -> None:
        if self.terminal:
            return tqdm.write(line, file=sys.stderr)
        rate = self.done / max(time.monotonic() - self.begun, 1e-9)
        left = tqdm.format_interval(int((self.total - self.done) / rate)) if rate else "?"
        print(f"{line} ({rate:.0f} {self.unit}s/s, {left} left)", file=sys.stderr, flush=True)
