"""What a job takes against what there is."""

from __future__ import annotations

from dataclasses import dataclass

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
