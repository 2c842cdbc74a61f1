"""What a job takes against what there is: memory of the machine, of containers, of a process, and of accelerators."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fusekit.disk import existing_parent, free_bytes, human
from fusekit.errors import FusekitError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Limit:
    """Bytes that are still available, and what limits them. address_space: mapped files count as well."""

    available: int
    source: str
    address_space: bool = False


def memory_limits() -> list[Limit]:
    """Every limit that applies: free memory of the machine, cgroups (containers), ``ulimit -v``."""
    limits = [Limit(psutil.virtual_memory().available, "free on this machine")]
    limits += cgroup_limits(Path("/sys/fs/cgroup"), _cgroup_paths())
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        limits.append(Limit(max(0, soft - used), "left of the address space limit (ulimit -v)", address_space=True))
    return limits


def taken_bytes() -> int:
    """Memory that this process has taken already: interpreter, libraries, tokenizers, and what it did before."""
    return int(psutil.Process().memory_info().rss)


def _cgroup_paths() -> dict[str, str]:
    """controller -> path of this process; the unified hierarchy of cgroup 2 has the name ``""``."""
    paths: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def cgroup_limits(root: Path, paths: dict[str, str]) -> list[Limit]:
    """The tightest memory limit of the cgroups that enclose a process, as a list of one or none.

    root: where cgroups are mounted. paths: as in /proc/self/cgroup, by controller. The page cache of inactive files
    counts as free: the kernel drops it first.
    """
    found: list[int] = []
    for base, path, limit, usage, inactive in (
        (root, paths.get(""), "memory.max", "memory.current", "inactive_file"),
        (
            root / "memory",
            paths.get("memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        if path is None:
            continue
        relative = Path(path.lstrip("/"))
        # In a container the path may be the host's: then only the mount's own root is visible.
        for folder in [base / relative, *(base / parent for parent in relative.parents), base]:
            with suppress(OSError, ValueError):
                most = int((folder / limit).read_text())  # "max" is a ValueError: no limit here
                if most < 1 << 60:
                    used = int((folder / usage).read_text())
                    found.append(max(0, most - used + _stat(folder / "memory.stat", inactive)))
    return [Limit(min(found), "left of the container's memory limit (cgroup)")] if found else []


def _stat(file: Path, key: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(line.split() for line in file.read_text().splitlines()).get(key, 0))
    return 0


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
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def release(device: torch.device) -> None:
    """Give cached memory back to the device. Call it outside of the ``except`` block, whose traceback holds tensors."""
    import torch

    gc.collect()
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "empty_cache"):
        backend.empty_cache()
