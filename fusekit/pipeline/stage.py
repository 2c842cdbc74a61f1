"""What the stages of a run are, and what they share: the recipe, its models, and the prepared examples."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint, load_tokenizer
from fusekit.data.templates import ChatTemplate, kept_date
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need, Processes
from fusekit.errors import DataError, StorageError
from fusekit.layout import PIVOT, Layout, folders_in
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Pivot
from fusekit.types import Row
from fusekit.yaml import Mistake

if TYPE_CHECKING:
    from fusekit.pipeline.plan import Planner


ROWS = "rows.jsonl"
NOWHERE = Layout(Path("/nonexistent"))
"""The output of a recipe that is not run."""


def choice_of(model: Pivot) -> ModelChoice:
    """How a model of a recipe is loaded."""
    how = model.model_dump(include={"trust_remote_code", "allow_pickle", "revision"})
    return ModelChoice(model.path, engine=model.engine, **how, **model.load.model_dump())


@dataclass(eq=False)
class Context:
    """What every stage gets: the recipe, where things go, and the models, each of which is looked up once.

    Attributes:
        say: gets a line of plain text for the user.
        quiet: no progress of captures.
        merge_options: fields of mergekit's MergeOptions that were asked for.
        ignore_estimates: start stages although disk or memory do not seem to suffice.
    """

    recipe: Recipe
    layout: Layout = NOWHERE
    say: Callable[[str], None] = lambda _: None
    quiet: bool = False
    merge_options: Mapping[str, Any] = field(default_factory=dict)
    ignore_estimates: bool = False
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    _readers: dict[str, RowTokenizer] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def processes(self) -> Processes:
        return Processes.current()

    @cached_property
    def rows(self) -> list[Row]:
        """The prepared examples. Raises StorageError where they are damaged."""
        return read_rows_file(self.layout.data)

    @cached_property
    def date(self) -> datetime.date:
        """The date that templates print in this run: the day its examples were prepared. Raises StorageError."""
        known = artifact.read(self.layout.data)
        return kept_date(known.made.get("date") if known is not None else None) or datetime.date.today()

    @property
    def targets(self) -> list[Path]:
        """Where the distilled models of the recipe are, or will be."""
        return [self.layout.targets / name for name in self.recipe.targets]

    @property
    def names(self) -> list[str]:
        """``pivot``, then the sources in the order of the recipe."""
        return list(self.recipe.models)

    def model(self, name: str) -> Pivot:
        """What the recipe says of a model."""
        return self.recipe.models[name]

    def choice(self, name: str) -> ModelChoice:
        """How a model is loaded."""
        return replace(choice_of(self.model(name)), dequantised=self.layout.pivot if name == PIVOT else None)

    def checkpoint(self, name: str, choice: ModelChoice | None = None) -> Checkpoint:
        """The model on disk or on the hub. Raises CaptureError. choice: of one that is neither pivot nor source."""
        if name not in self.checkpoints:
            self.checkpoints[name] = find_checkpoint(choice or self.choice(name))
        return self.checkpoints[name]

    def fingerprint(self, name: str) -> str:
        """What identifies a model's weights; a folder is read from end to end, once. Raises CaptureError."""
        if name not in self._fingerprints:
            self._fingerprints[name] = self.checkpoint(name).fingerprint()
        return self._fingerprints[name]

    def reader(self, name: str) -> RowTokenizer:
        """How the model reads examples in this run. Raises CaptureError, DataError."""
        if name not in self._readers:
            template, train_on = self.model(name).chat_template, self.recipe.data.train_on
            tokenizer = load_tokenizer(self.checkpoint(name))
            if template == PIVOT and name != PIVOT:
                pivot = self.reader(PIVOT)
                try:
                    theirs = pivot.template
                except DataError:  # plain text needs none, and conversations are refused when the pivot reads them
                    theirs = None
                self._readers[name] = RowTokenizer(tokenizer, theirs, train_on, foreign=pivot.tokenizer, date=self.date)
            else:
                self._readers[name] = RowTokenizer(tokenizer, ChatTemplate.chosen(template), train_on, date=self.date)
        return self._readers[name]

    def made(self, started: float) -> Inputs:
        """What may differ between equal artifacts. started: by ``time.monotonic``."""
        return {**artifact.circumstances(), "seconds": round(time.monotonic() - started, 3)}


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Write prepared examples, one JSON object a line: key, dataset, messages, cut."""
    with (folder / ROWS).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:  # escaped: lone surrogates and line separators come back as they were
            file.write(json.dumps(row.to_record()) + "\n")


def read_rows_file(folder: Path) -> list[Row]:
    """The examples that :func:`write_rows` wrote. Raises StorageError naming the damaged line."""
    rows: list[Row] = []
    path = folder / ROWS
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                rows.append(Row.from_record(json.loads(line)))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}, line {len(rows) + 1}, is damaged: {error}; remove {folder} and run again"
        ) from error
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write a value to a file of an artifact that is being made."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


MISSING, BEGUN, DONE, STALE = "to do", "resumes", "done", "refused"
"""States of an artifact: not there; a part of it is there; there and up to date; there, but its inputs changed."""


@dataclass(frozen=True)
class Status:
    """State of one artifact of a run.

    changed: of a stale one, a line per input that differs, with both values. note: what is there of one that is to be
    made. left: examples that one which was begun still lacks.
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
    """The status of an artifact. before: what it was made from, or None. inputs: what it would be made from now."""
    if before is None:
        return Status(folder)
    changed = artifact.differences(before, inputs(before))
    return Status(folder, STALE if changed else DONE, tuple(changed))


def made_from(folder: Path, stage: str) -> Inputs | None:
    """What a stage's artifact in a folder was made from, None where there is none.

    Raises StorageError for a damaged one, or one of another stage.
    """
    known = artifact.read(folder, stage)
    return known.inputs if known is not None else None


@dataclass
class Step:
    """An artifact of the run, or the scores of all models, in a plan.

    Attributes:
        stage: ``pivot`` (of a GGUF file), or one of :data:`STAGES`.
        name: of the model or pair.
        state: ``to do``, ``resumes``, ``done`` or ``refused``.
        note: what is there, or what differs.
        rows, tokens: what is still to be read, None where it is not known.
        disk: bytes that will be written and stay.
        memory: bytes that the stage asks for.
        pflop: floating point operations of the arithmetic alone, 1e15.
    """

    stage: str
    name: str
    state: str = MISSING
    note: str = ""
    rows: int | None = None
    tokens: int | None = None
    disk: int | None = None
    memory: int | None = None
    pflop: float | None = None

    @property
    def work(self) -> bool:
        """Whether anything is to be done."""
        return self.state not in (DONE, STALE)


class Stage:
    """One step of a run. Its artifacts have names: of models, pairs or distilled models.

    Attributes:
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
        """What it may have made."""
        found = ((place, layout.out / place) for place in self.places)
        return [path for place, at in found for path in (folders_in(at) if place.endswith("/") else [at])]

    def inputs(self, context: Context, name: str, before: Inputs) -> Inputs:
        """What an artifact is made from. before: the same of the one that is there, or nothing."""
        raise NotImplementedError

    def status(self, context: Context, name: str) -> Status:
        """The status of an artifact, where those of ``needs`` are there. Raises StorageError for a damaged manifest."""
        folder = self.artifacts(context)[name]
        return compared(folder, made_from(folder, self.name), partial(self.inputs, context, name))

    def make(self, context: Context) -> None:
        """Make what is missing. Raises StorageError where inputs changed."""
        for name in self.artifacts(context):
            if not self.status(context, name).is_done():
                self.make_one(context, name)

    def make_one(self, context: Context, name: str) -> None:
        """Make an artifact that is missing."""
        raise NotImplementedError

    def check_place(self, context: Context, name: str) -> None:
        """Raise StorageError for the folder of an artifact that holds what no run made, and would be lost."""
        artifact.refuse_occupied(self.artifacts(context)[name], self.name)

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
        """Set the figures of a step. Returns what has to be free before it is begun."""
        return []
