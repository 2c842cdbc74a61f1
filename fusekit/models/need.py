"""What a job takes against what there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusekit.errors import FusekitError
from fusekit.models.limits import memory_limits, taken_bytes
from fusekit.storage.faults import human


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


def refuse_lacking(needs: Iterable[Need], headline: str, way_out: str, kind: type[FusekitError]) -> None:
    """Raise an error of this kind with the numbers if something does not fit.

    headline: the first line. way_out: the last.
    """
    lacking = [f"  {need}" for need in needs if not need.fits]
    if lacking:
        rows = "\n".join(lacking)
        raise kind(f"{headline}\n{rows}\n{way_out}")
