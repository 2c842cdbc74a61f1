"""How far a capture is: a bar on a terminal, a plain line now and then otherwise, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts rows of ``total`` and their tokens. Use as a context manager."""

    def __init__(self, total: int, *, quiet: bool, label: str = "capturing") -> None:
        self.total, self.quiet, self.label = total, quiet, label
        self.rows = self.tokens = 0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        self.started = self.last_line = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, desc=self.label, unit="row", file=sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.rows:
            self._line()

    def advance(self, rows: int, tokens: int) -> None:
        """So many more rows and tokens went through the model."""
        self.rows += rows
        self.tokens += tokens
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self._rate():,.0f} tokens/s", refresh=False)
            self.bar.update(rows)
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self._line()

    def _rate(self) -> float:
        return self.tokens / max(time.monotonic() - self.started, 1e-9)

    def _line(self) -> None:
        self.last_line = time.monotonic()
        if self.quiet:
            return
        left = (self.last_line - self.started) / self.rows * (self.total - self.rows) if self.rows else 0.0
        print(
            f"{self.label}: {self.rows} of {self.total} rows, {self._rate():,.0f} tokens/s, {_duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
