"""``fusekit plan``: what a run would do, and the tokens, disk, memory and operations it takes. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import counted, existing_parent, free_bytes, human
from fusekit.capturing import estimate as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import Checkpoint
from fusekit.data.reading import is_on_hub
from fusekit.devices import Processes
from fusekit.distillation import estimate as training
from fusekit.errors import FusekitError, StorageError
from fusekit.evaluation.settings import held_out_rows
from fusekit.hub import memory_limits
from fusekit.layout import PIVOT, STAGES, Layout
from fusekit.pipeline.capturing import ALIGNED_TEXTS
from fusekit.pipeline.context import DONE, MISSING, STALE, Context, Status, paths_of
from fusekit.pipeline.distilling import settings_of, teachers_of
from fusekit.pipeline.evaluating import models_of
from fusekit.pipeline.merging import expected_needs
from fusekit.pipeline.plan_inputs import Counts, Known, Models, count_rows, find_models
from fusekit.pipeline.run import foreign_to_runs, layout_of
from fusekit.pipeline.stages import TABLE, check_place
from fusekit.recipe import Recipe
from fusekit.resources import Need
from fusekit.types import Row

HASHED_BYTES = 40 << 30
"""Weights in folders are read through to be compared with what an artifact was made from, up to this size."""
SMALL_FILES = 2 << 20
"""Bytes of a checkpoint besides its weights, where they are not at hand to be added up."""
PAGE_BYTES, MAP_BYTES = 110_000, 16
"""Bytes of an alignment's figures, page and samples; of its vocabulary map, per token of the source."""
SCORE_BYTES, ROW_BYTES = 1000, 128
"""Bytes of the scores of one model; of a row as JSON beside its contents."""
_CHANGES_SHOWN = 4


@dataclass
class Step:
    """An artifact of the run, or the scores of all models.

    Attributes:
        stage: ``pivot`` (of a GGUF file), or one of :data:`STAGES`.
        name: of the model, pair or target.
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
        return max(known, default=0) if figure == "memory" else sum(known), len(known) == len(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: bytes, 1e15 operations."""
        figures = {figure: self.total(figure) for figure in ("disk", "disk_at_most", "memory", "pflop")}
        totals = {figure: {"value": value, "complete": complete} for figure, (value, complete) in figures.items()}
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return asdict(self) | {"can_run": self.can_run, "totals": totals, "needs": needs}


def make_plan(recipe: Recipe, name: str, out: Path | None = None) -> Plan:
    """Say what ``fusekit run`` would do. Writes nothing.

    Args:
        recipe: what is to be run.
        name: what the plan calls it.
        out: the output to compare with, which need not exist.

    Raises FusekitError for settings that no run could have.
    """
    plan = Plan(name, str(out) if out is not None else None)
    layout = None
    if out is not None:
        try:
            layout = layout_of(out)
            if layout.out.is_dir() and (why := foreign_to_runs(layout)):
                plan.refused.append(why)
        except StorageError as error:
            plan.refused.append(str(error))
        except OSError as error:
            plan.refused.append(f"{out} cannot be read: {error.strerror or error}")
    models = find_models(recipe, layout)
    plan.refused += models.refused
    plan.unknown += models.unknown
    planner = _Planner(recipe, layout, models, plan)
    for stage in (PIVOT, *STAGES[:-1]):
        getattr(planner, f"plan_{stage}")()
    planner.sum_up()
    return plan


class _Planner:
    """Adds the steps of each stage to a plan, and what they need."""

    def __init__(self, recipe: Recipe, layout: Layout | None, models: Models, plan: Plan) -> None:
        self.recipe, self.models, self.plan = recipe, models, plan
        self.there = layout is not None and layout.out.is_dir()
        self.layout = layout or Layout(Path("/nonexistent"))
        self.place = existing_parent(layout.out if layout is not None else Path.cwd())
        self.context = Context(recipe, self.layout, models.readers, lambda _: None, True, most_hashed=HASHED_BYTES)
        self.rows = Counts()
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processes = Processes(0, 1, 1, device)

    def step(self, stage: str, name: str, comparable: bool = True) -> Step:
        """A new step in the state of its artifact.

        comparable: whether what it is made from is there; else only the place is looked at.
        """
        step = Step(stage, name)
        self.plan.steps.append(step)
        if not self.there:
            return step
        folder = TABLE[stage].artifacts(self.context)[name]

        def look() -> Status:
            check_place(self.context, stage, name)
            if comparable:
                return TABLE[stage].status(self.context, name)
            found = (folder / artifact.MANIFEST).is_file()
            return Status(
                folder, note="it is there; it is compared once the stages before it are done" if found else ""
            )

        status = self.tried(step, look)
        if status is not None:
            step.state, step.rows = status.state, status.left
            step.notes += [status.note] if status.note else []
            if status.changed:
                more = len(status.changed) - _CHANGES_SHOWN
                changed = "; ".join(status.changed[:_CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
                step.notes.append(f"its inputs changed: {changed}")
        return step

    def tried(self, step: Step, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; an error becomes the step's."""
        try:
            return work()
        except (FusekitError, OSError, ValueError) as error:
            step.state = STALE
            step.notes.append(str(error))
            return None

    @property
    def has_rows(self) -> bool:
        """Whether the prepared rows are there and up to date."""
        return any((step.stage, step.state) == ("data", DONE) for step in self.plan.steps)

    def plan_pivot(self) -> None:
        """A plain checkpoint of a pivot that is a GGUF file."""
        for name in TABLE[PIVOT].artifacts(self.context):
            step, checkpoint = self.step(PIVOT, name), self.models.pivot.checkpoint
            if step.work and checkpoint is not None:
                memory, disk = capture.dequantise_needs(checkpoint, self.place)
                step.memory, step.disk, step.disk_at_most = memory.needed, disk.needed, disk.needed
                self.plan.needs += [memory, disk]

    def plan_data(self) -> None:
        """Count rows and tokens; the run's own rows, where they are there."""
        step = self.step("data", "rows")
        prepared: list[Row] | None = None
        if step.state == DONE:
            prepared = self.tried(step, lambda: self.context.rows)
            step.notes += [counted(len(prepared), "row")] if prepared is not None else []
        self.rows = count_rows(self.recipe.data, self.models, prepared)
        self.plan.refused += self.rows.problems
        step.rows, step.tokens = self.rows.rows, self.rows.tokens_of(PIVOT)
        known = step.rows is not None or self.rows.problems
        (self.plan.basis if known else self.plan.unknown).extend(self.rows.said)
        content = self.rows.content_bytes
        if content is None and step.tokens is not None:
            content = 4 * step.tokens  # a token of text is about four bytes
        if content is not None and step.rows is not None:
            step.disk = step.disk_at_most = content + ROW_BYTES * step.rows

    def plan_respond(self) -> None:
        """The answers of every model; how long they will be is not known."""
        for name in TABLE["respond"].artifacts(self.context):
            step = self.step("respond", name, self.has_rows and self.models.known[name].checkpoint is not None)
            step.rows = step.rows if step.rows is not None else self.rows.rows

    def plan_judge(self) -> None:
        """The votes, and the stores of the winners' answers; they come from answers that may not be there."""
        answered = all(step.state == DONE for step in self.plan.steps if step.stage == "respond")
        for name in TABLE["judge"].artifacts(self.context):
            self.step("judge", name, answered and self.has_rows)

    def plan_capture(self) -> None:
        """A store of every model."""
        for name in TABLE["capture"].artifacts(self.context):
            known = self.models.known[name]
            at_hand = self.has_rows and known.checkpoint is not None and name in self.models.tokenizers
            step = self.step("capture", name, at_hand)
            if not step.work:
                continue
            tokens, labels, count = self.rows.tokens_of(name), self.rows.labels_of(name), self.rows.rows
            share = step.rows / count if step.rows is not None and count else 1.0
            step.rows = step.rows if step.rows is not None else count
            step.tokens = round(tokens * share) if tokens is not None else None
            if known.checkpoint is None:
                self.plan.unknown.append(f"capture {name}: how large {known.model} is")
                continue
            if tokens is not None and labels is not None and count is not None:
                sizes = {"rows": count, "vocabulary": self._vocabulary(known), "top_k": self.recipe.capture.top_k}
                # What the stage asks for takes every token for a label; what is expected does not.
                step.disk_at_most = round(share * capture.store_bytes(tokens=tokens, labels=tokens, **sizes))
                step.disk = round(share * capture.store_bytes(tokens=tokens, labels=labels, **sizes))
                what = f"disk ({counted(count, 'captured row')} of {name}, at most)"
                self._need_disk(what, step.disk_at_most, self.place)
                step.pflop = 2 * _active(known) * share * tokens / 1e15
            for need in capture.memory_needs(known.checkpoint, self.recipe.capture, self.processes):
                step.memory = max(step.memory or 0, need.needed)
                self.plan.needs.append(need)

    def _vocabulary(self, known: Known) -> int:
        assert known.checkpoint is not None
        reader = self.models.tokenizers.get(known.name)
        if reader is None:
            return capture.shape_of(known.checkpoint.config).vocabulary
        return vocabulary_size(known.checkpoint, reader)

    def plan_align(self) -> None:
        """The quality and the vocabulary map of every pair; small."""
        for source in self.recipe.sources:
            step = self.step("align", source.label, self.has_rows)
            if step.work:
                known = self.models.known[source.label]
                tokens = self._vocabulary(known) if known.checkpoint is not None else 0
                step.disk = step.disk_at_most = PAGE_BYTES + MAP_BYTES * tokens
                step.rows = min(self.rows.rows, ALIGNED_TEXTS) if self.rows.rows is not None else None

    def plan_distill(self) -> None:
        """A target per source or one of all, and plain fine-tuning to compare them with."""
        pivot, tokens, steps = self.models.pivot, self.rows.tokens_of(PIVOT), []
        for name in TABLE["distill"].artifacts(self.context):
            step = self.step("distill", name, self.has_rows)
            if not step.work or pivot.checkpoint is None:
                continue
            steps.append(step)
            values = settings_of(self.context, name).training
            step.rows, step.tokens = self.rows.rows, tokens
            step.disk = step.disk_at_most = pivot.checkpoint.weight_bytes + _small_files(pivot.checkpoint)
            if tokens is not None:
                # Forward 2 and backward 4 per parameter and token; 2 more to compute activations again; an adapter
                # leaves out the gradients of the weights.
                times = (4 if values.lora is not None else 6) + (2 if values.activation_checkpointing else 0)
                step.pflop = times * _active(pivot) * values.passes * tokens / 1e15
        if not steps or pivot.checkpoint is None:
            return
        longest = self.rows.longest or self.recipe.data.max_length
        memory: list[list[Need]] = []
        for step in steps:
            beside = self._loaded_beside(step.name)
            values = settings_of(self.context, step.name).training
            needs = training.memory_needs(pivot.checkpoint, values, longest, self.processes, beside)
            step.memory = needs[0].needed
            memory.append(needs)
        largest = max(memory, key=lambda needs: needs[0].needed)  # one is trained after the other
        self.plan.needs += largest + training.disk_needs(
            pivot.checkpoint, self.recipe.distill, self.place, results=1, download=False
        )

    def _loaded_beside(self, target: str) -> list[Checkpoint]:
        """The teachers that are in this machine's memory while a target is trained, as far as they are known."""
        settings = settings_of(self.context, target)
        teachers = teachers_of(self.context, target) if not settings.plain else []
        loaded = [
            self.models.known[source.label].checkpoint
            for source in self.recipe.sources
            if source.label in teachers
            and (source.on_the_fly or settings.training.on_policy)
            and source.engine.kind == "transformers"
        ]
        return [checkpoint for checkpoint in loaded if checkpoint is not None]

    def plan_merge(self) -> None:
        """The merged model, from the pivot's tensors as stand-ins for those of targets that are to be trained yet."""
        targets = [step for step in self.plan.steps if step.stage == "distill" and step.name in self.recipe.targets]
        for name in TABLE["merge"].artifacts(self.context):
            step = self.step("merge", name, all(target.state == DONE for target in targets))
            checkpoint, section = self.models.pivot.checkpoint, self.recipe.merge
            if step.work and checkpoint is not None and section is not None:
                disk, memory = expected_needs(checkpoint, section, len(targets), self.place / "merged")
                step.disk, step.disk_at_most, step.memory = disk.needed, disk.needed, memory.needed
                self.plan.needs += [disk, memory]

    @cached_property
    def _held_out(self) -> list[Row]:
        """Rows of local files; what is wrong with them is said once."""
        section = self.recipe.evaluate
        if section is None:
            return []
        try:
            here = [path for path in paths_of(section.path) if not is_on_hub(path)]
            return list(chain.from_iterable(held_out_rows(path, limit=section.limit) for path in here))
        except FusekitError as error:
            self.plan.refused.append(f"evaluate: {error}")
            return []

    def plan_evaluate(self) -> None:
        """Scores of all models, as one step."""
        if self.recipe.evaluate is None:
            return
        rows, names = self._held_out, list(models_of(self.context))
        step = Step("evaluate", counted(len(names), "model"))
        self.plan.steps.append(step)
        look = (lambda: [TABLE["evaluate"].status(self.context, name) for name in names]) if self.there else list
        if done := sum(status.state == DONE for status in self.tried(step, look) or []):
            step.notes.append(f"{done} have scores, which are kept unless the model or the rows changed")
        if not rows:
            self.plan.unknown.append("evaluate: how many rows are held out")
            return
        step.rows, step.disk = len(rows), SCORE_BYTES * len(names)
        reader, some = self.models.tokenizers.get(PIVOT), rows[:: max(1, len(rows) // 200)]
        try:
            step.tokens = sum(len(reader.tokenize(row)) for row in some) * len(rows) // len(some) if reader else None
        except FusekitError as error:
            self.plan.refused.append(f"evaluate: {error}")
            return
        sources = {f"sources/{name}": known for name, known in self.models.known.items()}
        each = [sources.get(name, self.models.pivot) for name in names]
        if step.tokens is not None and all(model.checkpoint is not None for model in each):
            step.pflop = sum(2 * _active(model) for model in each) * step.tokens / 1e15

    def sum_up(self) -> None:
        """Whole disks against what is free, the machine, and what the sums leave out."""
        plan = self.plan
        if said := [known.model for known in self.models.known.values() if known.said]:
            plan.basis.append(f"not cached and not reachable, so as large as the recipe says: {', '.join(said)}")
        self._need_disks()
        plan.basis.append("operations are 2 per parameter and token forward, 6 in training; attention comes on top")
        refused = [step for step in plan.steps if step.state == STALE]
        plan.refused += [f"{step.stage} {step.name}: {note}" for step in refused for note in step.notes[-1:]]
        limits = min(memory_limits(), key=lambda limit: limit.available)
        plan.machine = {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_free": limits.available,
            "memory_of": limits.source,
            "gpus": _gpus(),
            "disk_free": free_bytes(self.place),
            "disk_of": str(self.place),
        }

    def _need_disks(self) -> None:
        """What the whole run writes, and downloads, by disk."""
        from huggingface_hub import constants

        pivot, to_do = self.models.pivot.checkpoint, [step for step in self.plan.steps if step.work]
        written = sum(step.disk or 0 for step in to_do)
        trains = pivot is not None and any(step.stage == "distill" for step in to_do)
        work = training.kept_bytes(pivot, self.recipe.distill) if pivot is not None and trains else 0
        what = f"disk for the whole run ({human(written)} that stay, {human(work)} of checkpoints for a while"
        cache, needed = existing_parent(Path(constants.HF_HUB_CACHE)), written + work
        sizes = {known.model: known.download_bytes for known in self.models.known.values() if known.download_bytes}
        downloaded = sum(sizes.values())
        download = f"download of {counted(len(sizes), 'model')}, {human(downloaded)}"
        together = bool(sizes) and cache.stat().st_dev == self.place.stat().st_dev
        if together:
            self._need_disk(f"{what}, {download})", needed + downloaded, self.place)
        else:
            self._need_disk(f"{what})", needed, self.place)
        if sizes and not together:
            self._need_disk(download, downloaded, cache)

    def _need_disk(self, what: str, needed: int, place: Path) -> None:
        self.plan.needs.append(Need(what, needed, free_bytes(place), f"free on the disk of {place}"))


def _active(known: Known) -> int:
    """Parameters that take part in a token."""
    assert known.checkpoint is not None
    return known.active or capture.parameters(known.checkpoint)


def _small_files(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's files besides its weights: tokenizer, configuration."""
    if not checkpoint.folder.is_dir():
        return SMALL_FILES
    files = (path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "free": free, "memory": total})
    return found
