"""Run functions and ``fusekit`` commands in child processes that can be killed, starved and stopped for real."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import CONTEXT
from tests.merging.processes import Finished


def run(function: Callable[..., None], *given: Any, timeout: float = 120) -> Finished:
    """Call a module-level function in a process of its own, to its end."""
    return Process(function, *given).wait(timeout)


class Process:
    """A running child that calls a module-level function."""

    def __init__(self, function: Callable[..., None], *given: Any) -> None:
        self.log = Path(os.environ.get("TMPDIR", "/tmp")) / f"fusekit-test-{os.getpid()}-{time.monotonic_ns()}.log"
        self.process = CONTEXT.Process(target=_call, args=(self.log, function, given))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 120) -> Finished:
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        output = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        assert not late, f"still running after {timeout} s: {output}"
        assert self.process.exitcode is not None
        return Finished(self.process.exitcode, output)


def _call(log: Path, function: Callable[..., None], given: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # A test run in the background of a shell inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    function(*given)


def command(cwd: Path, args: tuple[str, ...], environment: dict[str, str], before: Callable[[], None] | None) -> None:
    """``fusekit ARGS`` in ``cwd``, as the script runs it. For :class:`Process`."""
    os.chdir(cwd)
    os.environ.update(environment)
    from fusekit.cli import main

    sys.argv = ["fusekit", *args]
    if before is not None:
        before()
    main()


def fusekit(cwd: Path, *args: str, before: Callable[[], None] | None = None) -> Finished:
    """Run ``fusekit ARGS`` in a process of its own, to its end."""
    return Process(command, cwd, args, {}, before).wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ranks(cwd: Path, world: int, *args: str, before: dict[int, Callable[[], None]] | None = None) -> list[Process]:
    """Start ``fusekit ARGS`` as the processes of one run, as torchrun would: connected by gloo on this machine."""
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        Process(command, cwd, args, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, (before or {}).get(rank))
        for rank in range(world)
    ]


def kill_all(processes: list[Process]) -> None:
    """SIGKILL what still runs, as a launcher does once one process has died."""
    for process in processes:
        if process.process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
