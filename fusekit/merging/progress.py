"""How far a merge is: a bar on a terminal, a plain line now and then otherwise, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fusekit.artifacts import human

LINE_SECONDS = 10.0


class Progress:
    """Counts bytes read for the merge, of ``total``. Use as a context manager; pass ``advance`` as a callback."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total = max(total, 1)
        self.done = 0
        self.quiet = quiet
        self.bar: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Progress:
        self.last_line = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, desc="merging", unit="B", unit_scale=True, file=sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and not self.quiet:
            self._line()

    def advance(self, size: int) -> None:
        """``size`` more bytes were read."""
        self.done += size
        if self.bar is not None:
            self.bar.update(size)
        elif not self.quiet and time.monotonic() - self.last_line > LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        share = min(100, 100 * self.done // self.total)
        print(f"merging: {share}% ({human(self.done)} of {human(self.total)} read)", file=sys.stderr, flush=True)
