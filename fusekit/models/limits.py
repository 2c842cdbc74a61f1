"""How much memory this process may still take: of the machine, of its container, and of its own address space."""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


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
            for controller in controllers.split(","):
                paths[controller] = path
    return paths


def cgroup_limits(root: Path, paths: dict[str, str]) -> list[Limit]:
    """The tightest memory limit of the cgroups that enclose a process, as a list of one or none.

    root: where cgroups are mounted. paths: as in /proc/self/cgroup, by controller. The page cache of inactive files
    counts as free: the kernel drops it first.
    """
    found: list[int] = []
    for base, path, names in (
        (root, paths.get(""), ("memory.max", "memory.current", "inactive_file")),
        (
            root / "memory",
            paths.get("memory"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        if path is None:
            continue
        relative = Path(path.lstrip("/"))
        # In a container the path may be the host's: then only the mount's own root is visible.
        for folder in [base / relative, *(base / parent for parent in relative.parents), base]:
            with suppress(OSError, ValueError):
                limit = int((folder / names[0]).read_text())  # "max" is a ValueError: no limit here
                if limit < 1 << 60:
                    used = int((folder / names[1]).read_text()) - _stat(folder / "memory.stat", names[2])
                    found.append(max(0, limit - used))
    return [Limit(min(found), "left of the container's memory limit (cgroup)")] if found else []


def _stat(file: Path, key: str) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, value = line.split()
            if name == key:
                return int(value)
    return 0
