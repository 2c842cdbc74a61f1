"""Child processes that can be killed, starved and stopped for real, forked in milliseconds from one server.

The server has imported what takes seconds. Python has one per process, whatever asks for it, so what it imports is
decided here and nowhere else.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
"""For subprocesses: fusekit of this checkout, installed or not."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "fusekit.cli.merge",
        "fusekit.cli.capture",
        "fusekit.cli.run",
        "fusekit.distillation.run",
        "fusekit.evaluation.metrics",
        "fusekit.merging.run",
        "fusekit.pipeline.run",
        "fusekit.pipeline.plan",
        "fusekit.capturing.capture",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "transformers.models.llama.modeling_llama",
        "tests.capture.store_processes",
    ]
)


@dataclass(frozen=True)
class Finished:
    """exitcode: negative for a signal. output: stdout and stderr together."""

    exitcode: int
    output: str


class Process:
    """A running child that calls a module-level function."""

    def __init__(self, function: Callable[..., object], *given: Any) -> None:
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


def _call(log: Path, function: Callable[..., object], given: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection would look at all that the server has imported
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # A test run in the background of a shell inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    function(*given)


def run(function: Callable[..., object], *given: Any, timeout: float = 120) -> Finished:
    """Call a module-level function in a process of its own, to its end."""
    return Process(function, *given).wait(timeout)


def command(
    cwd: Path, args: tuple[str, ...], environment: Mapping[str, str], before: Callable[[], object] | None
) -> None:
    """``fusekit ARGS`` in ``cwd``, as the script runs it. For :class:`Process`."""
    os.chdir(cwd)
    os.environ.update(environment)
    from fusekit.cli import main

    sys.argv = ["fusekit", *args]
    if before is not None:
        before()
    main()


def start(cwd: Path, *args: str, before: Callable[[], object] | None = None) -> Process:
    """Start ``fusekit ARGS``. before: called in the child first; a module-level function, or a partial of one."""
    return Process(command, cwd, args, {}, before)


def fusekit(cwd: Path, *args: str, before: Callable[[], object] | None = None) -> Finished:
    """Run ``fusekit ARGS`` in a process of its own, to its end."""
    return start(cwd, *args, before=before).wait()


def program(cwd: Path, code: str, environment: Mapping[str, str] | None = None) -> Finished:
    """Run Python source as ``python -c`` would, in a process that has most of its imports, to its end."""
    return run(_program, cwd, code, environment or {}, timeout=240)


def _program(cwd: Path, code: str, environment: Mapping[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


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


def stop_self() -> None:
    """Wait, stopped, until the parent sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def is_stopped(pid: int) -> bool:
    """Whether a process waits for SIGCONT."""
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T"


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def kill_at(number: int, counter: str) -> None:
    """SIGKILL this process at the number-th file operation on a folder ``out`` or beside it; 0 only counts.

    Python announces file operations before they happen, and loading libc before the exchange of two folders. The
    number of operations seen so far is kept in the file ``counter``, outside of the folder that is watched.
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


def under_strace(child: Process, inject: str) -> tuple[Finished, str]:
    """Let a child that stopped itself go on with faults in its system calls: what happened, and strace's log.

    inject: as for ``strace -e inject=``. The caller skips where strace may not attach (``strace_works``).
    """
    wait_until(lambda: is_stopped(child.pid))
    trace = child.log.with_suffix(".strace")
    calls = inject.split(":", maxsplit=1)[0]
    options = ["-f", "-o", str(trace), "-e", f"trace={calls}", "-e", f"inject={inject}", "-p", str(child.pid)]
    with subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(child.pid, signal.SIGCONT)
        finished = child.wait()
    text = trace.read_text()
    trace.unlink()
    return finished, text


def strace_works() -> bool:
    """Whether strace is here and may trace."""
    return shutil.which("strace") is not None and (
        subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False).returncode == 0
    )


def limit_file_size(limit: int) -> None:
    """``ulimit -f`` for this process: it stands in for a full disk where nothing can be mounted."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Run as nobody for a moment: root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
