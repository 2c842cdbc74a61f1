"""Ctrl-C and SIGTERM: both unwind, so that locks are released and temporary files removed, with their exit status."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def command_again(*left_out: str) -> str:
    """The command line of this process, to be typed again; without the options that shall not be repeated.

    Under ``torchrun`` or ``accelerate launch`` it is what follows the launcher and its options.
    """
    program = Path(sys.argv[0])
    arguments = [argument for argument in sys.argv[1:] if argument not in left_out]
    if program.name != "__main__.py":
        return shlex.join([program.name, *arguments])
    module = "fusekit.cli" if program.parent.name == "cli" else program.parent.name
    if "LOCAL_RANK" in os.environ:
        return shlex.join(["accelerate", "launch", "-m", module, *arguments]) + "   # with the launcher's own options"
    return shlex.join(["python", "-m", module, *arguments])


def status_of(error: BaseException) -> int:
    """The exit status for a run that was stopped by a signal: 130 or 143."""
    return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)
