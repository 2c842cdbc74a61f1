"""What a job takes against what there is."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusekit.artifacts import human
from fusekit.errors import FusekitError
from fusekit.hub import memory_limits, taken_bytes

if TYPE_CHECKING:
    import torch


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
