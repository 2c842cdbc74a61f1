"""What the commands share: how they stop, and what they print."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click


class TerminatedError(BaseException):
    """SIGTERM, as an exception that unwinds like KeyboardInterrupt."""


@contextmanager
def interruptible(stopped: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the body, so that locks are released and temporary files removed; then exit.

    stopped: says what is there; the exit status is that of the signal (130 or 143). Where another process of the run
    failed, which says why, it is 1.
    """
    from fusekit.devices import OtherProcessError

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
    except (KeyboardInterrupt, TerminatedError) as error:
        stopped()
        sys.exit(128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT))
    except OtherProcessError:
        sys.exit(1)


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


def print_json(value: Any) -> None:
    """The result of a command for programs; escaped where the output cannot take it (names that are no UTF-8)."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1)
    click.echo(text)


def show(found: Any, *, as_json: bool) -> None:
    """A result that has ``as_dict``, for programs or for people."""
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(str(found))


def drop_noise() -> None:
    """Bars for loading weights and advice about generation: nothing that a user of a command could act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
