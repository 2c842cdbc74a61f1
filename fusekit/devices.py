"""The processes of a run, usually one; their devices, threads and memory; and its progress."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from tqdm import tqdm

from fusekit.disk import existing_parent, free_bytes, human
from fusekit.errors import CaptureError, FusekitError

# A process that is done waits for the slowest one, however long that captures; the default is half an hour.
PATIENCE = timedelta(days=30)

Result = TypeVar("Result")


class OtherProcessError(CaptureError):
    """Another process of the run stopped, and said why."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: from 0, of ``world``.
        local: how many share this machine.
        connected: whether the processes of the run can wait for each other; else each does its share alone.
    """

    rank: int
    world: int
    local: int
    device: torch.device
    connected: bool = True

    @classmethod
    def current(cls) -> Processes:
        """As accelerate sees it; it connects several processes, by NCCL between GPUs and otherwise by gloo."""
        from accelerate import PartialState

        # Without the flag accelerate leaves the processes of a machine without accelerators on their own.
        state: Any = PartialState(cpu=_accelerator() is None, timeout=PATIENCE)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        return cls(state.process_index, state.num_processes, local, torch.device(state.device))

    @classmethod
    def separate(cls, rank: int, world: int) -> Processes:
        """One of ``world`` processes that know nothing of each other. Raises CaptureError for no such rank."""
        if not 0 <= rank < world:
            raise CaptureError(f"rank is {rank}, but ranks are from 0 to {world - 1} (world is {world})")
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        kind = _accelerator()
        device = (
            torch.device("cpu") if kind is None else torch.device(kind.type, local % torch.accelerator.device_count())
        )
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
        return cls(rank, world, int(here) if here.isdecimal() else 1, device, connected=False)

    @classmethod
    def started(cls, rank: int | None = None, world: int | None = None) -> Processes:
        """The processes as they were started: by arguments, by torch's or accelerate's launcher, by Slurm, or alone.

        ``RANK`` and ``WORLD_SIZE`` without the ``MASTER_ADDR`` of a launcher, or ``SLURM_PROCID`` and ``SLURM_NTASKS``,
        are separate processes.

        Raises CaptureError where one of rank and world is given without the other.
        """
        if (rank is None) != (world is None):
            raise CaptureError(f"rank is {rank}, world is {world}: give both or none (--rank, --world)")
        if rank is not None and world is not None:
            return cls.separate(rank, world)
        known = os.environ
        names = ("RANK", "WORLD_SIZE") if "RANK" in known else ("SLURM_PROCID", "SLURM_NTASKS")
        launched = "RANK" in known and "MASTER_ADDR" in known
        if not launched and all(known.get(name, "").isdecimal() for name in names) and int(known[names[1]]) > 1:
            return cls.separate(*(int(known[name]) for name in names))
        return cls.current()

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0 or not self.connected

    def first_then_all(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns in process 0; the others wait for it.

        Raises what it raises there, and :class:`OtherProcessError` in the others.
        """
        if self.world == 1 or not self.connected:
            return function()
        failure: Exception | None = None
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message = [function(), None]
            except Exception as error:
                failure, message = error, [None, str(error)]
        torch.distributed.broadcast_object_list(message, src=0)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise OtherProcessError(f"process 0 stopped: {message[1]}")
        result: Result = message[0]
        return result

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1 and self.connected:
            torch.distributed.barrier()


def _accelerator() -> torch.device | None:
    """The kind of accelerator to use, None for the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return None
    return torch.accelerator.current_accelerator(check_available=True)


def missing_device(name: str | int) -> str | None:
    """Why torch cannot compute on a device here, None where it can. name: ``cpu``, ``cuda``, ``cuda:1``, an index."""
    there = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if there is not None else 0
    try:
        device = torch.device(name)
    except RuntimeError:
        return f"{name!r} is not a torch device: give cpu, cuda, cuda:0 or the like"
    if device.type == "cpu" or (there is not None and there.type == device.type and (device.index or 0) < count):
        return None
    return f"there is no device {name} on this machine, which has {f'{count} of {there}' if there else 'only a CPU'}"


def side_by_side(
    new_worker: Callable[[], Callable[[int, int], Result]], bounds: Sequence[tuple[int, int]], threads: int
) -> list[Result]:
    """Call workers with every (start, stop), each once, on threads of one torch thread each; the results in order.

    Splitting every torch operation over the threads instead would make each wait for its slowest part, long on a busy
    machine, and sums would depend on how they are split. new_worker: called once per thread; a worker may own scratch
    memory, and runs without gradients. Raises whatever a worker raises first; nothing new is begun then.
    """
    results: dict[int, Result] = {}
    queue = iter(range(len(bounds)))  # next() on it is atomic
    failed = threading.Event()

    def run() -> None:
        work = new_worker()
        with torch.no_grad():  # grad mode is per thread
            for index in queue:
                if failed.is_set():
                    return
                try:
                    results[index] = work(*bounds[index])
                except BaseException:
                    failed.set()
                    raise

    configured = torch.get_num_threads()
    try:
        # In a worker this sets that thread's own limit, and with it the value that new threads start from ...
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(run) for _ in range(threads)]:
                future.result()
    finally:
        torch.set_num_threads(configured)  # ... which is put back here
    return [results[index] for index in range(len(bounds))]


class _PlainLines(tqdm):
    """Progress where no line can be redrawn: a new line every half minute, and none for what ends sooner."""

    def __init__(self, *args: Any, **options: Any) -> None:
        line = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}{postfix}, {remaining} left"
        super().__init__(*args, **options, bar_format=line, mininterval=30.0, maxinterval=30.0, delay=30.0)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Writes a line."""

        def write(line: str) -> None:
            if line:
                file.write(f"{line}\n")
                file.flush()

        return write

    def clear(self, nolock: bool = False) -> None:
        """Nothing is there to be cleared."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool:  # noqa: ARG002
        """Nothing is drawn again."""
        return True


def progress(total: int, label: str, unit: str, *, quiet: bool = False, done: int = 0) -> Any:
    """A bar on stderr with rate and time left; without a terminal a plain line every half minute.

    total: of units, of which ``done`` were done earlier; bytes are shown as kB, MB, ...
    """
    kind = tqdm if sys.stderr.isatty() else _PlainLines
    return kind(total=total, desc=label, unit=unit, disable=quiet, initial=done, unit_scale=unit == "byte")


def duration(seconds: float) -> str:
    """``0:08``, ``12:30``, ``3:02:11``."""
    text: str = tqdm.format_interval(seconds)
    return text.removeprefix("0") if len(text) == 5 else text


# ---------------------------------------------------------------- memory and disk


@dataclass(frozen=True)
class Limit:
    """Bytes that are still available, and what limits them. address_space: mapped files count as well."""

    available: int
    source: str
    address_space: bool = False


def memory_limits() -> list[Limit]:
    """Every limit that applies: free memory of the machine, cgroups (containers), ``ulimit -v``."""
    limits = [Limit(psutil.virtual_memory().available, "free on this machine")]
    with suppress(OSError):
        path = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        limits += cgroup_limits(Path("/sys/fs/cgroup"), path)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        limits.append(Limit(max(0, soft - used), "left of the address space limit (ulimit -v)", address_space=True))
    return limits


def taken_bytes() -> int:
    """Memory that this process has taken already: interpreter, libraries, tokenizers, and what it did before."""
    return int(psutil.Process().memory_info().rss)


def cgroup_limits(root: Path, path: str) -> list[Limit]:
    """The tightest memory limit of the cgroups (version 2) that enclose a process, as a list of one or none.

    root: where cgroups are mounted. path: as in /proc/self/cgroup. The page cache of inactive files counts as free: the
    kernel drops it first.
    """
    found: list[int] = []
    relative = Path(path.lstrip("/"))
    # In a container the path may be the host's: then only the mount's own root is visible.
    for folder in [root / relative, *(root / parent for parent in relative.parents), root]:
        with suppress(OSError, ValueError):
            most = int((folder / "memory.max").read_text())  # "max" is a ValueError: no limit here
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(max(0, most - used + int(statistics.get("inactive_file", 0))))
    return [Limit(min(found), "left of the container's memory limit (cgroup)")] if found else []


@dataclass(frozen=True)
class Need:
    """Something that a job takes. what: a line for people. needed, free: bytes, free where."""

    what: str
    needed: int
    free: int
    where: str

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed <= self.free

    @property
    def tight(self) -> bool:
        """Whether it takes more than half of what is free, or more."""
        return 2 * self.needed > self.free

    def __str__(self) -> str:
        return f"{self.what}: about {human(self.needed)} needed, {human(self.free)} {self.where}"


def main_memory(what: str, needed: int, processes: int = 1, mapped: int = 0) -> Need:
    """Main memory of processes like this one: what each has taken already and ``needed`` besides, against the limits.

    What they have taken counts on both sides, so that the figure is the processes' peak. mapped: bytes of files, which
    a limit of a process's address space counts too.
    """
    tightest, taken = min(memory_limits(), key=lambda limit: limit.available), taken_bytes()
    if tightest.address_space:
        processes, needed = 1, needed + mapped
    return Need(what, (taken + needed) * processes, tightest.available + taken * processes, tightest.source)


def disk_need(what: str, needed: int, place: Path) -> Need:
    """A need of so many bytes on the disk of ``place``, which need not exist yet."""
    return Need(what, needed, free_bytes(place), f"free on the disk of {place}")


def disk(wanted: Iterable[tuple[Path, int, str]]) -> list[Need]:
    """A need for each disk. wanted: where, how many bytes, and what they are for."""
    by_device: dict[int, list[tuple[Path, int, str]]] = {}
    for path, size, what in wanted:
        by_device.setdefault(existing_parent(path).stat().st_dev, []).append((path, size, what))
    return [
        disk_need(
            "disk, for " + ", ".join(what for _, _, what in items), sum(size for _, size, _ in items), items[0][0]
        )
        for items in by_device.values()
    ]


def worth_saying(needs: Iterable[Need]) -> list[str]:
    """A line for each need that is tight; for all of them where the log level is INFO (``-v``)."""
    every = logging.getLogger("fusekit").isEnabledFor(logging.INFO)
    return [str(need) for need in needs if every or need.tight]


def refuse_lacking(needs: Iterable[Need], headline: str, way_out: str, kind: type[FusekitError]) -> None:
    """Raise an error of this kind with the numbers if something does not fit.

    headline: the first line. way_out: the last.
    """
    lacking = [f"  {need}" for need in needs if not need.fits]
    if lacking:
        rows = "\n".join(lacking)
        raise kind(f"{headline}\n{rows}\n{way_out}")


# What allocators say that raise a plain RuntimeError.
_PHRASES = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on other systems
    "out of memory",  # CUDA, MPS, XPU
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # its workspace does not fit
    "could not create a primitive",  # oneDNN
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of an accelerator or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def release(device: torch.device) -> None:
    """Give cached memory back to the device. Call it outside of the ``except`` block, whose traceback holds tensors."""
    gc.collect()
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "empty_cache"):
        backend.empty_cache()
