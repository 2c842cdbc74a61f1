"""Run ``fusekit merge`` in child processes that can be killed, starved and stopped for real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import CONTEXT

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
"""For subprocesses: fusekit of this checkout, installed or not."""


@dataclass(frozen=True)
class Finished:
    """exitcode: negative for a signal. output: stdout and stderr together."""

    exitcode: int
    output: str


class Child:
    """A running ``fusekit merge``; ``before`` is called in the child first (a module-level function)."""

    def __init__(self, cwd: Path, *args: str, before: Callable[..., None] | None = None, given: tuple[Any, ...] = ()):
        self.log = cwd / f".log-{time.monotonic_ns()}"
        self.process = CONTEXT.Process(target=_main, args=(args, cwd, self.log, before, given))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 120) -> Finished:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.log.read_text()}")
        return Finished(self.process.exitcode, self.log.read_text())


def fusekit_merge(
    cwd: Path, *args: str, before: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Finished:
    """Run ``fusekit merge ARGS`` in ``cwd`` to its end."""
    return Child(cwd, *args, before=before, given=given).wait()


def _main(
    args: tuple[str, ...], cwd: Path, log: Path, before: Callable[..., None] | None, given: tuple[Any, ...]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(cwd)
    # A test run in the background of a shell inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from fusekit.cli import main

    torch.set_num_threads(1)
    sys.argv = ["fusekit", "merge", *args]
    if before is not None:
        before(*given)
    main()


def stop_self() -> None:
    """Wait, stopped, until the parent sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_at_event(number: int, counter: str) -> None:
    """SIGKILL this process at the number-th file operation on the output or beside it; 0 only counts.

    Python announces file operations before they happen, and loading libc before the exchange of two folders. The
    number of events seen so far is kept in the file ``counter``, outside of the folder that is watched.
    """
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlopen"):
            return
        if event != "ctypes.dlopen" and not any("/out" in str(a) or ".out." in str(a) for a in args[:2]):
            return
        seen += 1
        if number == 0:
            descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, str(seen).encode())
            os.close(descriptor)
        elif seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def under_strace(cwd: Path, inject: str, *args: str) -> tuple[Finished, str]:
    """Run ``fusekit merge`` with faults injected into its system calls; returns what happened and strace's log.

    inject: as for ``strace -e inject=``. The caller skips where strace may not attach (``strace_works``).
    """
    child = Child(cwd, *args, before=stop_self)
    wait_until(lambda: is_stopped(child.pid))
    trace = cwd / ".strace"
    calls = inject.split(":", maxsplit=1)[0]
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", trace, "-e", f"trace={calls}", "-e", f"inject={inject}", "-p", str(child.pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    with tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(child.pid, signal.SIGCONT)
        finished = child.wait()
    return finished, trace.read_text()


def strace_works() -> bool:
    """Whether strace is here and may trace."""
    return shutil.which("strace") is not None and (
        subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False).returncode == 0
    )


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def is_stopped(pid: int) -> bool:
    """Whether a process waits for SIGCONT."""
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T"
