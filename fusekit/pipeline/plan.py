"""What a run would do, and the tokens, disk, memory and operations it takes; the stages add their steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusekit.capturing import models as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, is_on_hub, read_rows
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need, Processes, disk_need
from fusekit.disk import counted, existing_parent, human
from fusekit.distillation import arguments as training
from fusekit.errors import FusekitError
from fusekit.hub import HubUnreachableError
from fusekit.layout import PIVOT
from fusekit.pipeline.stage import DONE, NOWHERE, STALE, Context, Stage, Status, Step, choice_of
from fusekit.recipe.sections import Data, ModelSize, Pivot
from fusekit.types import Row

SAMPLED_BYTES, SAMPLED_ROWS = 1 << 20, 2000
"""Contents, and examples, that are tokenized for every model, at most."""


@dataclass
class Counts:
    """What is known of the examples of a run.

    Attributes:
        rows: how many will be kept, None where unknown.
        tokens, labels: of all of them, by model that can read them.
        longest: tokens of the longest that was read, for any model, at most ``max_length``.
        content_bytes: of all examples, None where unknown.
        unknown, problems: lines: what could not be found out, and why a run would be refused.
    """

    rows: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    content_bytes: int | None = None
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, figures: dict[str, int], name: str) -> int | None:
        """Tokens or labels for a model; the pivot's, or anyone's, for one whose tokenizer is not here."""
        return figures.get(name, figures.get(PIVOT, next(iter(figures.values()), None)))


def count_rows(section: Data, readers: dict[str, RowTokenizer], prepared: list[Row] | None = None) -> Counts:
    """Count the examples of a recipe, and their tokens: of all where they are few, else of a sample.

    Args:
        section: of the recipe.
        readers: by model, those that are at hand.
        prepared: the examples of the run's own artifact, where that is there.
    """
    try:
        if prepared is not None:
            return _counted(prepared, readers, section, ready=True)
        if remote := [path for path in section.paths if is_on_hub(path)]:
            return _as_said(section, remote[0])
        counts = DataCounts(section.on_bad_row)
        return _counted(list(read_rows(section.paths, limit=section.limit, counts=counts)), readers, section)
    except FusekitError as error:
        return Counts(problems=[f"data: {error}"])


def _as_said(section: Data, name: str) -> Counts:
    """What the recipe says of data on the hub."""
    size = section.size
    if size is None:
        line = f"{name} is on the hub, and a plan downloads no data: say `data.size: {{rows: ..., tokens: ...}}`"
        return Counts(unknown=[line])
    found = Counts(min(size.rows, section.limit or size.rows), longest=section.max_length)
    if size.tokens is not None:
        share = (found.rows or 0) / size.rows
        found.tokens[PIVOT] = round(size.tokens * share)
        found.labels[PIVOT] = round((size.labels or size.tokens) * share)
        if section.pack:
            found.rows = math.ceil(found.tokens[PIVOT] / section.max_length)
    return found


def _counted(rows: list[Row], readers: dict[str, RowTokenizer], section: Data, ready: bool = False) -> Counts:
    """Tokenize a sample, and scale it. ready: the rows are prepared already."""
    if not ready and not section.pack:
        rows = list({row.key: row for row in rows}.values())
    if not rows or not readers:
        return Counts(len(rows), unknown=["no model's tokenizer is at hand: tokens are not known"])
    size = sum(len(message.content) for row in rows for message in row.messages)
    taken = max(1, min(len(rows), len(rows) * SAMPLED_BYTES // max(size, 1), SAMPLED_ROWS))
    sample, scale = [rows[i * len(rows) // taken] for i in range(taken)], len(rows) / taken  # evenly spread
    found = Counts(content_bytes=round(scale * sum(len(m.content.encode()) for row in sample for m in row.messages)))
    if not ready:
        tokenizers = list(readers.values())
        if section.pack:
            sample = list(pack_text(sample, tokenizers, section.max_length))
        sample = prepare(sample, tokenizers, section.max_length, section.overlong).rows
    found.rows = round(len(sample) * scale)
    for name, reader in readers.items():
        read = [reader.tokenize(row) for row in sample]
        found.tokens[name] = round(sum(map(len, read)) * scale)
        found.labels[name] = round(sum(len(row.label_positions) for row in read) * scale)
        found.longest = max([found.longest, *map(len, read)])
    return found


@dataclass
class Plan:
    """What `fusekit run` would do.

    Attributes:
        recipe, out: as given; out may be None.
        steps: in order.
        needs: what the stages ask for before they start, and the whole run of each disk.
        refused: lines: what is known to stop the run.
        unknown: lines: what could not be found out, so that sums are "at least".
    """

    recipe: str
    out: str | None
    steps: list[Step] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

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
        return max(known, default=0) if figure == "memory" else sum(known), len(known) == len(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: bytes, 1e15 operations."""
        figures = {figure: self.total(figure) for figure in ("disk", "memory", "pflop")}
        totals = {figure: {"value": value, "complete": complete} for figure, (value, complete) in figures.items()}
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return asdict(self) | {"can_run": self.can_run, "totals": totals, "needs": needs}


class Planner:
    """What the stages plan their steps with.

    Attributes:
        there: whether there is an output.
        place: a folder on the disk where it is or will be.
        rows: what is known of the examples, once the stage ``data`` is planned.
        models: those of which the size is known.
        tokenizers: how models read examples, of those that are at hand.
        processes: this one alone.
    """

    def __init__(self, context: Context, plan: Plan) -> None:
        self.context, self.recipe, self.plan = context, context.recipe, plan
        self.there = context.layout.out.is_dir()
        self.place = existing_parent(Path.cwd() if context.layout is NOWHERE else context.layout.out)
        self.rows = Counts()
        self.models: dict[str, Checkpoint] = {}
        self.tokenizers: dict[str, RowTokenizer] = {}
        self.processes = Processes(0, 1, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def find_models(self) -> None:
        """Look every model up, all at once: each waits for the hub. Nothing is loaded, and no weights are fetched."""
        names, plan = self.context.names, self.plan
        with ThreadPoolExecutor(len(names)) as pool:
            found = dict(zip(names, pool.map(lambda name: _look_up(self.context.choice(name)), names), strict=True))
        for name, checkpoint in found.items():
            section = self.context.model(name)
            if isinstance(checkpoint, Checkpoint):
                self.context.checkpoints[name] = self.models[name] = checkpoint
                plan.unknown += checkpoint.notices
                continue
            if not isinstance(checkpoint, HubUnreachableError):
                plan.refused.append(str(checkpoint))
            elif section.size is None:
                plan.unknown.append(f"{checkpoint}; `size:` in the recipe would let a plan count it")
            if section.size is not None:
                self.models[name] = _made_up(section, section.size)
        for name in self.context.checkpoints:
            if self.context.model(name).chat_template != PIVOT or PIVOT in self.tokenizers:
                try:
                    self.tokenizers[name] = self.context.reader(name)
                except FusekitError as error:
                    plan.refused.append(str(error))

    def step(self, stage: Stage, name: str) -> Step:
        """A new step in the state of its artifact, or of its place where it cannot be compared yet."""
        step = Step(stage.name, name)
        self.plan.steps.append(step)
        if not self.there:
            return step

        def look() -> Status:
            stage.check_place(self.context, name)
            if stage.can_compare(self, name):
                return stage.status(self.context, name)
            return Status(stage.artifacts(self.context)[name])

        status = self.tried(step, look)
        if status is not None:
            step.state, step.rows, step.note = status.state, status.left, status.note
            if status.changed:
                step.note = f"its inputs changed: {'; '.join(status.changed)}"
        return step

    def tried(self, step: Step, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; an error becomes the step's."""
        try:
            return work()
        except (FusekitError, OSError, ValueError) as error:
            step.state = STALE
            step.note = str(error)
            return None

    def done(self, stage: str) -> bool:
        """Whether all artifacts of a stage are there and up to date."""
        return all(step.state == DONE for step in self.plan.steps if step.stage == stage)

    def vocabulary(self, name: str) -> int:
        """Size of a model's vocabulary, 0 where it is not known."""
        if name not in self.models:
            return 0
        reader = self.tokenizers.get(name)
        if reader is None:
            return capture.shape_of(self.models[name].config).vocabulary
        return vocabulary_size(self.models[name], reader)

    def active(self, name: str) -> int:
        """Parameters that take part in a token."""
        size = self.context.model(name).size
        return (size.active_parameters if size is not None else None) or capture.parameters(self.models[name])

    def sum_up(self) -> None:
        """What the steps are refused for, and what the whole run writes, and downloads, by disk."""
        from huggingface_hub import constants

        refused = [step for step in self.plan.steps if step.state == STALE]
        self.plan.refused += [f"{step.stage} {step.name}: {step.note}" for step in refused]
        pivot, to_do = self.models.get(PIVOT), [step for step in self.plan.steps if step.work]
        written = sum(step.disk or 0 for step in to_do)
        trains = pivot is not None and any(step.stage == "distill" for step in to_do)
        work = training.kept_bytes(pivot, self.recipe.distill) if pivot is not None and trains else 0
        what = f"disk for the whole run ({human(written)} that stay, {human(work)} for checkpoints while it trains"
        cache, needed = existing_parent(Path(constants.HF_HUB_CACHE)), written + work
        sizes = {
            self.context.model(name).path: size
            for name, known in self.models.items()
            if (size := known.download_bytes if name in self.context.checkpoints else known.weight_bytes)
        }
        downloaded = sum(sizes.values())
        download = f"download of {counted(len(sizes), 'model')}, {human(downloaded)}"
        if sizes and cache.stat().st_dev == self.place.stat().st_dev:
            self.plan.needs.append(disk_need(f"{what}, {download})", needed + downloaded, self.place))
            return
        self.plan.needs.append(disk_need(f"{what})", needed, self.place))
        if sizes:
            self.plan.needs.append(disk_need(download, downloaded, cache))


def _look_up(choice: ModelChoice) -> Checkpoint | FusekitError:
    try:
        return find_checkpoint(choice, download=False)
    except FusekitError as error:
        return error


def _made_up(section: Pivot, size: ModelSize) -> Checkpoint:
    """A checkpoint as large as the recipe says, in no folder."""
    names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "dtype"}
    weights = {"model.safetensors": size.parameters * capture.itemsize(size.dtype)}
    return Checkpoint(
        choice_of(section), Path("(not here)"), size.model_dump(include=names, exclude_none=True), weights
    )
