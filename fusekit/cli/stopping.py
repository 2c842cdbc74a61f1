"""Ctrl-C and SIGTERM: both unwind, so that locks are released and temporary files removed, with their exit status."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(BaseException):
    """SIGTERM, as an exception that unwinds like KeyboardInterrupt."""


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise TerminatedError while the body runs."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def status_of(error: BaseException) -> int:
    """The exit status for a run that was stopped by a signal: 130 or 143."""
    return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)
