"""What a stage of a run is: its artifacts, what each is made from, its status, how it is made, and what that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.devices import Need
from fusekit.layout import Layout, folders_in
from fusekit.pipeline.context import Context
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Mistake

if TYPE_CHECKING:
    from fusekit.pipeline.plan import Planner

MISSING, BEGUN, DONE, STALE = "to do", "resumes", "done", "refused"
"""States of an artifact: not there; a part of it is there; there and up to date; there, but its inputs changed."""


@dataclass(frozen=True)
class Status:
    """State of one artifact of a run.

    Attributes:
        folder: of the artifact.
        state: MISSING, BEGUN, DONE or STALE.
        changed: of a stale one, a line per input that differs, with both values.
        note: for people: what is there of one that is to be made.
        left: of one that was begun, how many examples are still to do.
    """

    folder: Path
    state: str = MISSING
    changed: tuple[str, ...] = ()
    note: str = ""
    left: int | None = None

    def is_done(self, way_out: str | None = None) -> bool:
        """Whether it is up to date. Raises StorageError naming every input that changed, and the way out."""
        artifact.refuse_changes(self.folder, self.changed, way_out)
        return self.state == DONE


def compared(folder: Path, before: Inputs | None, inputs: Callable[[Inputs], Inputs]) -> Status:
    """The status of an artifact by its inputs.

    Args:
        folder: of the artifact.
        before: what the one that is there was made from, None where there is none.
        inputs: given ``before``, what it would be made from now. With ``before`` among them, nothing is missed.
    """
    if before is None:
        return Status(folder)
    changed = artifact.differences(before, inputs(before))
    return Status(folder, STALE if changed else DONE, tuple(changed))


def made_from(folder: Path) -> Inputs | None:
    """What the artifact in a folder was made from, None where there is none. Raises StorageError for a damaged one."""
    known = artifact.read(folder)
    return known.inputs if known is not None else None


@dataclass
class Step:
    """An artifact of the run, or the scores of all models.

    Attributes:
        stage: ``pivot`` (of a GGUF file), or one of :data:`STAGES`.
        name: of the model or pair.
        state: ``to do``, ``resumes``, ``done`` or ``refused``.
        notes: what is there, what differs, what a figure leaves out.
        rows, tokens: what is still to be read, None where it is not known.
        disk: bytes that will be written and stay.
        disk_at_most: bytes that the stage asks for before it starts.
        memory: bytes that the stage asks for.
        pflop: floating point operations of the arithmetic alone, 1e15.
    """

    stage: str
    name: str
    state: str = MISSING
    notes: list[str] = field(default_factory=list)
    rows: int | None = None
    tokens: int | None = None
    disk: int | None = None
    disk_at_most: int | None = None
    memory: int | None = None
    pflop: float | None = None

    @property
    def work(self) -> bool:
        """Whether anything is to be done."""
        return self.state not in (DONE, STALE)


class Stage:
    """One step of a run. Its artifacts have names: of models, pairs or distilled models.

    Attributes:
        name: of the stage.
        places: in an output, of what it may have made, whatever recipe asked for it; with a slash, of folders in it.
        needs: the stages whose artifacts it reads.
        shared: whether every process takes part in :meth:`make`, not the first alone.
    """

    name = ""
    places: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    shared = False

    def artifacts(self, context: Context) -> dict[str, Path]:
        """The folders of its artifacts by name, in order."""
        raise NotImplementedError

    def wanted(self, context: Context) -> list[Path]:
        """Folders that a run of the recipe keeps."""
        return list(self.artifacts(context).values())

    def made(self, layout: Layout) -> list[Path]:
        """What it may have made: its ``places``."""
        found = ((place, layout.out / place) for place in self.places)
        return [path for place, at in found for path in (folders_in(at) if place.endswith("/") else [at])]

    def inputs(self, context: Context, name: str, before: Inputs) -> Inputs:
        """What an artifact is made from. before: the same of the one that is there, empty where there is none."""
        raise NotImplementedError

    def status(self, context: Context, name: str) -> Status:
        """Of one artifact; those of ``needs`` have to be there. Raises StorageError for a damaged manifest."""
        folder = self.artifacts(context)[name]
        return compared(folder, made_from(folder), partial(self.inputs, context, name))

    def make(self, context: Context) -> None:
        """Make what is missing. Raises StorageError where inputs changed."""
        for name in self.artifacts(context):
            if not self.status(context, name).is_done():
                self.make_one(context, name)

    def make_one(self, context: Context, name: str) -> None:
        """Make an artifact that is missing."""
        raise NotImplementedError

    def check_place(self, context: Context, name: str) -> None:
        """Refuse the folder of an artifact, if it holds what no run made: it would be lost.

        Raises StorageError naming the folder, a file in it, and the way out; also for a damaged manifest.
        """
        artifact.refuse_occupied(self.artifacts(context)[name])

    def mistakes(self, recipe: Recipe, layout: Layout | None = None) -> list[Mistake]:  # noqa: ARG002
        """What is wrong with a recipe that can be read. layout: of the run, None where it has no folder yet."""
        return []

    def plan(self, planner: Planner) -> None:
        """Add a step for each artifact to a plan, and what it needs."""
        for name in self.artifacts(planner.context):
            planner.plan.needs += self.estimate(planner, planner.step(self, name))

    def can_compare(self, planner: Planner, name: str) -> bool:  # noqa: ARG002
        """Whether what an artifact is made from is there, so that a plan may ask for its status."""
        return all(planner.done(need) for need in self.needs)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:  # noqa: ARG002
        """Set the figures of a step; returns what has to be free before it is begun."""
        return []
