"""What a plan says: one step per artifact of a run, sums over them, and what is not known."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fusekit.resources import Need

TO_DO, GOES_ON, REUSED, REFUSED = "to do", "goes on", "reused", "refused"
"""Nothing is there; a part is; all of it, from the same inputs; something made from other inputs, or by no run."""


@dataclass
class Step:
    """An artifact of the run.

    Attributes:
        stage: ``pivot`` (of a GGUF file), ``data``, ``capture``, ``align``, ``distill``, ``merge`` or ``evaluate``.
        name: of the model, pair or target.
        state: one of the four above.
        notes: what is there, what differs, what a figure leaves out.
        rows, tokens: what is still to be read, None where it is not known.
        disk: bytes that will be written and stay, as measured on a sample where that was done.
        disk_at_most: bytes that the stage asks for before it starts.
        memory: bytes that the stage asks for.
        seconds: from a measurement on a sample; None without one.
        pflop: floating point operations of the arithmetic alone, 1e15.
    """

    stage: str
    name: str
    state: str = TO_DO
    notes: list[str] = field(default_factory=list)
    rows: int | None = None
    tokens: int | None = None
    disk: int | None = None
    disk_at_most: int | None = None
    memory: int | None = None
    seconds: float | None = None
    pflop: float | None = None

    @property
    def work(self) -> bool:
        """Whether anything is to be done."""
        return self.state in (TO_DO, GOES_ON)


@dataclass
class Plan:
    """What `fusekit run` would do.

    Attributes:
        recipe, out: as given; out may be None.
        steps: in order.
        needs: what the stages ask for before they start, and the whole run of each disk.
        refused: lines: what is known to stop the run.
        unknown: lines: what could not be found out, so that sums are "at least".
        basis: lines: what the figures are based on.
        machine: what there is.
    """

    recipe: str
    out: str | None
    steps: list[Step] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    basis: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def lacking(self) -> list[Need]:
        """What does not fit."""
        return [need for need in self.needs if not need.fits]

    @property
    def can_run(self) -> bool:
        """Whether nothing is known that would stop it."""
        return not self.refused and not self.lacking

    def total(self, figure: str) -> tuple[float, bool]:
        """The sum (the maximum, of memory) of a figure over the steps that have work, and whether all had it."""
        found = [getattr(step, figure) for step in self.steps if step.work]
        known = [value for value in found if value is not None]
        value = max(known, default=0) if figure == "memory" else sum(known)
        return value, len(known) == len(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: bytes, seconds, 1e15 operations."""
        totals = {}
        for figure in ("disk", "disk_at_most", "memory", "seconds", "pflop"):
            value, complete = self.total(figure)
            totals[figure] = {"value": value, "complete": complete}
        return {
            "recipe": self.recipe,
            "out": self.out,
            "can_run": self.can_run,
            "steps": [asdict(step) for step in self.steps],
            "totals": totals,
            "needs": [asdict(need) | {"fits": need.fits} for need in self.needs],
            "refused": self.refused,
            "unknown": self.unknown,
            "basis": self.basis,
            "machine": self.machine,
        }
