"""``logs/run.log``: what runs of an output said, with times; for people, no artifact."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import fusekit
from fusekit.artifacts import disk_fault
from fusekit.errors import StorageError

NAME = "run.log"


class RunLog:
    """Lines with the time of each, at the end of a file. A line is written at once, so a run that dies leaves all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def write(self, text: str) -> None:
        """Add a text, each of its lines under the same time. Raises StorageError when the disk fails."""
        now = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        lines = "".join(f"{now} {line}\n" for line in text.splitlines() or [""])
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(lines)
        except OSError as error:
            raise disk_fault(error, self.path) or StorageError(f"{self.path}: cannot be written: {error}") from error

    @contextmanager
    def around(self) -> Iterator[None]:
        """Write who runs what before the body, and how it ended after it."""
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.write(f"fusekit {fusekit.__version__}, process {os.getpid()} on {socket.gethostname()}: {command}")
        try:
            yield
        except BaseException as error:
            with suppress(StorageError):  # a disk that is full shall not hide what stopped the run
                self.write(f"stopped by {type(error).__name__}: {error}".rstrip(": "))
            raise
        self.write("done")
