"""``fusekit plan``: what a run would do, and the tokens, disk, memory and operations it takes. Nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fusekit import artifacts as artifact
from fusekit.artifacts import counted, existing_parent, free_bytes, human
from fusekit.capturing import estimate as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.reading import is_on_hub
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.distillation import estimate as training
from fusekit.errors import FusekitError, StorageError
from fusekit.evaluation.settings import held_out_rows
from fusekit.hub import HubUnreachableError
from fusekit.layout import PIVOT, STAGES
from fusekit.pipeline.capturing import ALIGNED_TEXTS
from fusekit.pipeline.context import DONE, MISSING, NOWHERE, STALE, Context, Status, choice_of, paths_of
from fusekit.pipeline.distilling import settings_of, teachers_of
from fusekit.pipeline.evaluating import models_of
from fusekit.pipeline.merging import expected_needs
from fusekit.pipeline.plan_data import Counts, count_rows
from fusekit.pipeline.run import TABLE, check_place, foreign_to_runs, layout_of
from fusekit.recipe import Recipe
from fusekit.recipe.sections import ModelSize, Pivot
from fusekit.resources import Need, memory_limits
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
    plan, layout = Plan(name, str(out) if out is not None else None), NOWHERE
    if out is not None:
        try:
            layout = layout_of(out)
            if layout.out.is_dir() and (why := foreign_to_runs(layout)):
                plan.refused.append(why)
        except StorageError as error:
            plan.refused.append(str(error))
        except OSError as error:
            plan.refused.append(f"{out} cannot be read: {error.strerror or error}")
    planner = _Planner(Context(recipe, layout, most_hashed=HASHED_BYTES), plan)
    planner.find_models()
    for stage in (PIVOT, *STAGES[:-1]):
        getattr(planner, f"plan_{stage}")()
    planner.sum_up()
    return plan


class _Planner:
    """Adds the steps of each stage to a plan, and what they need."""

    def __init__(self, context: Context, plan: Plan) -> None:
        self.context, self.recipe, self.plan = context, context.recipe, plan
        self.there = context.layout.out.is_dir()
        self.place = existing_parent(Path.cwd() if context.layout is NOWHERE else context.layout.out)
        self.rows = Counts()
        self.models: dict[str, Checkpoint] = {}  # those of whose size is known; of `as_said` nothing else
        self.as_said: set[str] = set()
        self.tokenizers: dict[str, RowTokenizer] = {}
        self.processes = Processes(0, 1, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def find_models(self) -> None:
        """Look every model up, all at once: each waits for the hub no longer than one would.

        Nothing is loaded and no weights are fetched; the hub's client keeps the small files that it fetches in its
        cache.
        """
        names, plan = self.context.names, self.plan
        with ThreadPoolExecutor(len(names)) as pool:
            found = dict(zip(names, pool.map(lambda name: _look_up(self.context.choice(name)), names), strict=True))
        for name, checkpoint in found.items():
            section = self.context.model(name)
            if isinstance(checkpoint, Checkpoint):
                self.context.checkpoints[name] = self.models[name] = checkpoint
                plan.unknown += checkpoint.notices
                continue
            unreachable = isinstance(checkpoint, HubUnreachableError)
            if section.size is None:
                says = f"{checkpoint}; `size:` in the recipe would let a plan count it"
                (plan.unknown if unreachable else plan.refused).append(says)
            else:
                plan.refused += [] if unreachable else [str(checkpoint)]
                self.models[name] = _made_up(section, section.size)
                self.as_said.add(name)
        for name in [name for name in names if name in self.context.checkpoints]:
            if self.context.model(name).chat_template == PIVOT and PIVOT not in self.tokenizers:
                continue
            try:
                self.tokenizers[name] = self.context.reader(name)
            except FusekitError as error:
                plan.refused.append(str(error))

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

    def done(self, stage: str) -> bool:
        """Whether all artifacts of a stage are there and up to date."""
        return all(step.state == DONE for step in self.plan.steps if step.stage == stage)

    def plan_pivot(self) -> None:
        """A plain checkpoint of a pivot that is a GGUF file."""
        for name in TABLE[PIVOT].artifacts(self.context):
            step, checkpoint = self.step(PIVOT, name), self.models.get(PIVOT)
            if step.work and checkpoint is not None:
                memory, disk = capture.dequantise_needs(checkpoint, self.place)
                step.memory, step.disk, step.disk_at_most = memory.needed, disk.needed, disk.needed
                self.plan.needs += [memory, disk]

    def plan_data(self) -> None:
        """Count examples and tokens; the run's own examples, where they are there."""
        step = self.step("data", "rows")
        prepared: list[Row] | None = None
        if step.state == DONE:
            prepared = self.tried(step, lambda: self.context.rows)
            step.notes += [counted(len(prepared), "example")] if prepared is not None else []
        self.rows = count_rows(self.recipe.data, self.tokenizers, prepared)
        self.plan.refused += self.rows.problems
        step.rows, step.tokens = self.rows.rows, self.rows.of(self.rows.tokens, PIVOT)
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
            step = self.step("respond", name, self.done("data") and name in self.models)
            step.rows = step.rows if step.rows is not None else self.rows.rows

    def plan_judge(self) -> None:
        """The votes, and the stores of the winners' answers; they come from answers that may not be there."""
        for name in TABLE["judge"].artifacts(self.context):
            self.step("judge", name, self.done("respond") and self.done("data"))

    def plan_capture(self) -> None:
        """A store of every model."""
        for name in TABLE["capture"].artifacts(self.context):
            checkpoint = self.models.get(name)
            step = self.step("capture", name, self.done("data") and name in self.tokenizers)
            if not step.work:
                continue
            tokens, labels = (self.rows.of(of, name) for of in (self.rows.tokens, self.rows.labels))
            count = self.rows.rows
            share = step.rows / count if step.rows is not None and count else 1.0
            step.rows = step.rows if step.rows is not None else count
            step.tokens = round(tokens * share) if tokens is not None else None
            if checkpoint is None:
                self.plan.unknown.append(f"capture {name}: how large {self.context.model(name).path} is")
                continue
            if tokens is not None and labels is not None and count is not None:
                sizes = {"rows": count, "vocabulary": self._vocabulary(name), "top_k": self.recipe.capture.top_k}
                # What the stage asks for takes every token for a label; what is expected does not.
                step.disk_at_most = round(share * capture.store_bytes(tokens=tokens, labels=tokens, **sizes))
                step.disk = round(share * capture.store_bytes(tokens=tokens, labels=labels, **sizes))
                what = f"disk ({counted(count, 'captured example')} of {name}, at most)"
                self._need_disk(what, step.disk_at_most, self.place)
                step.pflop = 2 * self._active(name) * share * tokens / 1e15
            for need in capture.memory_needs(checkpoint, self.recipe.capture, self.processes):
                step.memory = max(step.memory or 0, need.needed)
                self.plan.needs.append(need)

    def _vocabulary(self, name: str) -> int:
        if name not in self.models:
            return 0
        reader = self.tokenizers.get(name)
        if reader is None:
            return capture.shape_of(self.models[name].config).vocabulary
        return vocabulary_size(self.models[name], reader)

    def _active(self, name: str) -> int:
        """Parameters that take part in a token."""
        size = self.context.model(name).size
        return (size.active_parameters if size is not None else None) or capture.parameters(self.models[name])

    def plan_align(self) -> None:
        """The quality and the vocabulary map of every pair; small."""
        for source in TABLE["align"].artifacts(self.context):
            step = self.step("align", source, self.done("data"))
            if step.work:
                step.disk = step.disk_at_most = PAGE_BYTES + MAP_BYTES * self._vocabulary(source)
                step.rows = min(self.rows.rows, ALIGNED_TEXTS) if self.rows.rows is not None else None

    def plan_distill(self) -> None:
        """A target per source or one of all, and plain fine-tuning to compare them with."""
        pivot, tokens, needs = self.models.get(PIVOT), self.rows.of(self.rows.tokens, PIVOT), list[list[Need]]()
        for name in TABLE["distill"].artifacts(self.context):
            step = self.step("distill", name, self.done("data"))
            if not step.work or pivot is None:
                continue
            values = settings_of(self.context, name).training
            step.rows, step.tokens = self.rows.rows, tokens
            step.disk = step.disk_at_most = pivot.weight_bytes + _small_files(pivot)
            if tokens is not None:
                # Forward 2 and backward 4 per parameter and token; 2 more to compute activations again; an adapter
                # leaves out the gradients of the weights.
                times = (4 if values.lora is not None else 6) + (2 if values.activation_checkpointing else 0)
                step.pflop = times * self._active(PIVOT) * values.passes * tokens / 1e15
            longest, beside = self.rows.longest or self.recipe.data.max_length, self._loaded_beside(name)
            needs.append(training.memory_needs(pivot, values, longest, self.processes, beside))
            step.memory = needs[-1][0].needed
        if needs and pivot is not None:
            disk = training.disk_needs(pivot, self.recipe.distill, self.place, results=1, download=False)
            self.plan.needs += max(needs, key=lambda of: of[0].needed) + disk  # one is trained after the other

    def _loaded_beside(self, target: str) -> list[Checkpoint]:
        """The teachers that are in this machine's memory while a target is trained, as far as they are known."""
        settings = settings_of(self.context, target)
        teachers = teachers_of(self.context, target) if not settings.plain else []
        loaded = [
            source.label
            for source in self.recipe.sources
            if source.label in teachers
            and (source.on_the_fly or settings.training.on_policy)
            and source.engine.kind == "transformers"
        ]
        return [self.models[name] for name in loaded if name in self.models]

    def plan_merge(self) -> None:
        """The merged model, from the pivot's tensors as stand-ins for those of targets that are to be trained yet."""
        targets = [step for step in self.plan.steps if step.stage == "distill" and step.name in self.recipe.targets]
        for name in TABLE["merge"].artifacts(self.context):
            step = self.step("merge", name, all(target.state == DONE for target in targets))
            checkpoint, section = self.models.get(PIVOT), self.recipe.merge
            if step.work and checkpoint is not None and section is not None:
                disk, memory = expected_needs(checkpoint, section, len(targets), self.place / "merged")
                step.disk, step.disk_at_most, step.memory = disk.needed, disk.needed, memory.needed
                self.plan.needs += [disk, memory]

    def plan_evaluate(self) -> None:
        """Scores of all models, as one step."""
        section = self.recipe.evaluate
        if section is None:
            return
        names = list(models_of(self.context))
        step = Step("evaluate", counted(len(names), "model"))
        self.plan.steps.append(step)

        def look() -> int:
            for name in names:
                check_place(self.context, "evaluate", name)
            return sum(TABLE["evaluate"].status(self.context, name).state == DONE for name in names)

        if done := self.there and self.tried(step, look):
            step.notes.append(f"{done} have scores, which are kept unless the model or the examples changed")
        reader = self.tokenizers.get(PIVOT)
        try:
            here = [path for path in paths_of(section.path) if not is_on_hub(path)]
            rows = list(chain.from_iterable(held_out_rows(path, limit=section.limit) for path in here))
            some = rows[:: max(1, len(rows) // 200)]
            if reader is not None and some:
                step.tokens = sum(len(reader.tokenize(row)) for row in some) * len(rows) // len(some)
        except FusekitError as error:
            self.plan.refused.append(f"evaluate: {error}")
            return
        if not rows:
            self.plan.unknown.append("evaluate: how many examples are held out")
            return
        step.rows, step.disk = len(rows), SCORE_BYTES * len(names)
        each = [name.removeprefix("sources/") if name.startswith("sources/") else PIVOT for name in names]
        if step.tokens is not None and all(name in self.models for name in each):
            step.pflop = sum(2 * self._active(name) for name in each) * step.tokens / 1e15

    def sum_up(self) -> None:
        """Whole disks against what is free, the machine, and what the sums leave out."""
        plan = self.plan
        if said := [self.context.model(name).path for name in self.context.names if name in self.as_said]:
            plan.basis.append(f"not cached and not reachable, so as large as the recipe says: {', '.join(said)}")
        self._need_disks()
        plan.basis.append("operations are 2 per parameter and token forward, 6 in training; attention comes on top")
        refused = [step for step in plan.steps if step.state == STALE]
        plan.refused += [f"{step.stage} {step.name}: {note}" for step in refused for note in step.notes[-1:]]
        limits = min(memory_limits(), key=lambda limit: limit.available)
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append({"name": torch.cuda.get_device_name(index), "free": free, "memory": total})
        plan.machine = {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_free": limits.available,
            "memory_of": limits.source,
            "gpus": gpus,
            "disk_free": free_bytes(self.place),
            "disk_of": str(self.place),
        }

    def _need_disks(self) -> None:
        """What the whole run writes, and downloads, by disk."""
        from huggingface_hub import constants

        pivot, to_do = self.models.get(PIVOT), [step for step in self.plan.steps if step.work]
        written = sum(step.disk or 0 for step in to_do)
        trains = pivot is not None and any(step.stage == "distill" for step in to_do)
        work = training.kept_bytes(pivot, self.recipe.distill) if pivot is not None and trains else 0
        what = f"disk for the whole run ({human(written)} that stay, {human(work)} of checkpoints for a while"
        cache, needed = existing_parent(Path(constants.HF_HUB_CACHE)), written + work
        sizes = {
            self.context.model(name).path: size
            for name, known in self.models.items()
            if (size := known.weight_bytes if name in self.as_said else known.download_bytes)
        }
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


def _look_up(choice: ModelChoice) -> Checkpoint | FusekitError:
    try:
        return find_checkpoint(choice, download=False)
    except HubUnreachableError as error:
        return error
    except FusekitError as error:
        return _without_weights(choice) or error


def _without_weights(choice: ModelChoice) -> Checkpoint | None:
    """A model of which only the small files are cached, where the hub does not answer: as large as its index says."""
    try:
        found = find_checkpoint(choice, weights=False, download=False)
        if found.snapshot is None or found.snapshot.online:
            return None
        index = json.loads((found.folder / "model.safetensors.index.json").read_bytes())
        total = int(index["metadata"]["total_size"])
    except (FusekitError, OSError, ValueError, KeyError, TypeError):
        return None
    notices = [*found.notices, f"{choice.model}: its weights are not in the cache, so a run has to reach the hub"]
    return replace(found, weights={"model.safetensors": total}, notices=notices)


def _made_up(section: Pivot, size: ModelSize) -> Checkpoint:
    """A checkpoint as large as the recipe says, in no folder."""
    names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "dtype"}
    weights = {"model.safetensors": size.parameters * capture.itemsize(size.dtype)}
    return Checkpoint(
        choice_of(section), Path("(not here)"), size.model_dump(include=names, exclude_none=True), weights
    )


def _small_files(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's files besides its weights: tokenizer, configuration."""
    if not checkpoint.folder.is_dir():
        return SMALL_FILES
    files = (path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    return sum(path.stat().st_size for path in files if path.is_file())
