"""From a recipe to its plan: what is there, what is to do, and what that takes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fusekit.artifacts import existing_parent, free_bytes, human
from fusekit.capturing import estimate as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.data.reading import is_on_hub
from fusekit.devices import Processes
from fusekit.distillation import estimate as training
from fusekit.distillation.outputs import Target, targets_of
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import FusekitError
from fusekit.evaluation.settings import held_out_rows
from fusekit.gguf import SUFFIX
from fusekit.hub import memory_limits
from fusekit.pipeline.distilling import plain
from fusekit.pipeline.evaluating import models_of
from fusekit.pipeline.layout import BASELINE, PIVOT, Layout
from fusekit.pipeline.stages import ALIGNED_TEXTS
from fusekit.plan import measure as timing
from fusekit.plan.data import Rows, count_rows
from fusekit.plan.figures import REFUSED, REUSED, Plan, Step
from fusekit.plan.models import SAID, Known, Models, find_models
from fusekit.plan.reuse import Output, foreign, step_for
from fusekit.recipe import Recipe
from fusekit.resources import Need
from fusekit.types import Row

SMALL_FILES = 2 << 20
"""Of a checkpoint besides its weights, where they are not at hand to be added up."""

PAGE_BYTES = 110_000
"""Of an alignment's figures, its page of three texts and their tokens."""

MAP_BYTES = 16
"""Of a vocabulary map, per token of the source: an entry and where its row ends."""

SCORE_BYTES = 1000
"""Of the scores of one model."""

ROW_BYTES = 128
"""Of a row as JSON beside its contents: key, roles, source."""

ALIGNED_TO_TIME = 32


def make_plan(recipe: Recipe, name: str, out: Path | None = None, *, measured: bool = True) -> Plan:
    """Say what ``fusekit run`` would do. Writes nothing.

    Args:
        recipe: what is to be run.
        name: what the plan calls it.
        out: the output to compare with, which need not exist.
        measured: whether to load the models that are here and small for a short measurement.

    Raises:
        FusekitError: settings that no run could have.
    """
    plan = Plan(name, str(out) if out is not None else None)
    models = find_models(recipe, Layout(out.resolve()) if out is not None else None)
    plan.refused += models.refused
    plan.unknown += models.unknown
    if out is not None and (why := foreign(out)):
        plan.refused.append(why)
    job = _Job(recipe, out, models, Output(recipe, out, models), plan)
    job.pivot()
    job.data()
    if measured:
        job.time_models()
    job.captures()
    job.alignments()
    job.trainings()
    job.merge()
    job.evaluations()
    job.sums()
    return plan


@dataclass
class _Job:
    recipe: Recipe
    out: Path | None
    models: Models
    output: Output
    plan: Plan
    rows: Rows = field(default_factory=Rows)
    speeds: dict[str, timing.Speed] = field(default_factory=dict)
    trained: timing.Training | None = None
    targets_there: bool = False

    @property
    def processes(self) -> Processes:
        """One process, on the device that a run would take."""
        return Processes(0, 1, 1, timing.device())

    @property
    def place(self) -> Path:
        """Where the output is or will be; here, if none is named."""
        return self.out if self.out is not None else Path.cwd()

    def step(self, stage: str, name: str) -> Step:
        step = step_for(stage, name)
        self.plan.steps.append(step)
        return step

    def pivot(self) -> None:
        """A plain checkpoint of a pivot that is a GGUF file."""
        known = self.models.pivot
        if not known.model.endswith(SUFFIX):
            return
        step = self.step(PIVOT, "dequantised")
        self.output.pivot(step)
        if not step.work or known.checkpoint is None:
            return
        memory, disk = capture.dequantise_needs(known.checkpoint, existing_parent(self.place))
        step.memory, step.disk, step.disk_at_most = memory.needed, disk.needed, disk.needed
        self.plan.needs += [memory, disk]

    def data(self) -> None:
        """Count rows and tokens; the run's own rows, where they are there."""
        step = self.step("data", "rows")
        self.output.data(step)
        section = self.recipe.data
        self.rows = count_rows(section, self.models, self.output.rows)
        if step.state == REUSED and self.output.rows is not None:
            step.notes.append(f"{len(self.output.rows)} rows")
        self.plan.refused += self.rows.problems
        self.plan.basis += self.rows.said
        step.rows, step.tokens = self.rows.count, self.rows.tokens_of(PIVOT)
        if self.rows.count is None and not self.rows.problems:
            self.plan.unknown += self.rows.said
            self.plan.basis = []
        step.seconds = self.rows.seconds
        content = self.rows.content_bytes
        if content is None and step.tokens is not None:
            content = 4 * step.tokens  # a token of text is about four bytes
        if content is not None and step.rows is not None:
            step.disk = step.disk_at_most = content + ROW_BYTES * step.rows

    def time_models(self) -> None:
        """Load what is here and small, one after the other."""
        held_out = self._held_out
        metrics = self.recipe.evaluate.metrics if self.recipe.evaluate else []
        for name, known in self.models.known.items():
            reader = self.models.tokenizers.get(name)
            if reader is None or not self.rows.sample or known.checkpoint is None:
                continue
            needs = capture.memory_needs(known.checkpoint, self.recipe.capture.batch_tokens, self.processes)
            if not timing.fits(known, needs):
                if known.here:
                    self.plan.unknown.append(f"{known.model} is too large to be loaded for a plan: no time measured")
                continue
            generate = (
                timing.generating(reader, held_out, self.recipe.capture.batch_tokens)
                if "exact_match" in metrics and held_out
                else lambda _model: None
            )
            try:
                self.speeds[name] = timing.measure_capture(
                    known, reader, self.rows.sample, self.recipe.capture, generate
                )
            except FusekitError as error:
                self.plan.refused.append(str(error))
        self._measure_training()
        if self.speeds:
            self.plan.basis.append(
                f"times are those of {sum(len(s.captured) for s in self.speeds.values())} captured rows and a few "
                "training batches, on this machine as it is now"
            )

    def _measure_training(self) -> None:
        pivot = self.models.pivot
        if PIVOT not in self.speeds or pivot.checkpoint is None or not self.speeds[PIVOT].captured:
            return
        needs = training.memory_needs(pivot.checkpoint, self.recipe.distill, self.rows.longest, self.processes)
        if not timing.fits(pivot, needs):
            self.plan.unknown.append(f"training {pivot.model} was not measured: it would take more than half of memory")
            return
        try:
            self.trained = timing.measure_training(
                pivot, self.speeds[PIVOT].captured, self.rows.sample, self.recipe.distill, self.recipe.fusion
            )
        except FusekitError as error:
            self.plan.refused.append(str(error))

    def captures(self) -> None:
        """A store of every model."""
        for name, known in self.models.known.items():
            step = self.step("capture", name)
            self.output.store(step, name)
            if not step.work:
                continue
            tokens, labels, count = self.rows.tokens_of(name), self.rows.labels_of(name), self.rows.count
            share = step.rows / count if step.rows is not None and count else 1.0
            step.rows = step.rows if step.rows is not None else count
            step.tokens = round(tokens * share) if tokens is not None else None
            if known.checkpoint is None:
                self.plan.unknown.append(f"capture {name}: how large {known.model} is")
                continue
            if tokens is not None and labels is not None and count is not None:
                self._store(step, known, share, {"rows": count, "tokens": tokens, "labels": labels})
            for need in capture.memory_needs(known.checkpoint, self.recipe.capture.batch_tokens, self.processes):
                step.memory = max(step.memory or 0, need.needed)
                self.plan.needs.append(need)

    def _store(self, step: Step, known: Known, share: float, counts: dict[str, int]) -> None:
        """The figures of a store, of which ``share`` is to be made. counts: rows, tokens, labels of all of it."""
        assert known.checkpoint is not None
        tokens, labels = counts["tokens"], counts["labels"]
        sizes = counts | {"vocabulary": self._vocabulary(known), "top_k": self.recipe.capture.top_k}
        # What the stage asks for takes every token for a label; what is expected does not.
        step.disk_at_most = round(share * capture.store_bytes(**(sizes | {"labels": tokens})))
        step.disk = round(share * capture.store_bytes(**sizes))
        place = existing_parent(self.place)
        what = f"disk ({counts['rows']} captured rows of {known.name}, at most)"
        self.plan.needs.append(Need(what, step.disk_at_most, free_bytes(place), f"free on the disk of {place}"))
        speed = self.speeds.get(known.name)
        if speed is not None and speed.labels:
            step.disk = round(share * speed.store * labels / speed.labels)
            step.seconds = speed.load + share * tokens / speed.tokens if speed.tokens else None
        step.pflop = 2 * self._active(known) * share * tokens / 1e15

    def _vocabulary(self, known: Known) -> int:
        assert known.checkpoint is not None
        reader = self.models.tokenizers.get(known.name)
        shape = capture.shape_of(known.checkpoint.config)
        return shape.vocabulary if reader is None else vocabulary_size(known.checkpoint, reader)

    def _active(self, known: Known) -> int:
        assert known.checkpoint is not None
        return known.active or capture.parameters(known.checkpoint)

    def alignments(self) -> None:
        """The quality and the vocabulary map of every pair; small."""
        for source in self.recipe.sources:
            step = self.step("align", source.label)
            self.output.alignment(step, source.label)
            if not step.work:
                continue
            known = self.models.known[source.label]
            tokens = self._vocabulary(known) if known.checkpoint is not None else 0
            step.disk = step.disk_at_most = PAGE_BYTES + MAP_BYTES * tokens
            step.rows = min(self.rows.count, ALIGNED_TEXTS) if self.rows.count is not None else None
            pivot, theirs = (self.models.tokenizers.get(name) for name in (PIVOT, source.label))
            texts = [row.messages[-1].content for row in self.rows.sample[:ALIGNED_TO_TIME] if row.messages[-1].content]
            if self.speeds and pivot is not None and theirs is not None and texts and step.rows:
                step.seconds = step.rows * timing.measure_alignment(pivot, theirs, texts)

    def trainings(self) -> None:
        """A target per source or one of all, and plain fine-tuning to compare them with."""
        settings = self.recipe.settings
        labels = [source.label for source in self.recipe.sources]
        targets = targets_of(settings, labels, self.output.layout.targets)
        made = [self._training("distill", target, settings) for target in targets]
        self.targets_there = all(step.state == REUSED for step in made)
        if self.recipe.wants_baseline:
            alone = plain(settings)
            (target,) = targets_of(alone, labels, self.output.layout.baselines)
            made.append(self._training("distill", target, alone, BASELINE))
        self._training_needs(sum(step.work for step in made))

    def _training(self, stage: str, target: Target, settings: DistillSettings, name: str | None = None) -> Step:
        step = self.step(stage, name or target.name)
        self.output.target(step, target, settings)
        known, tokens = self.models.pivot, self.rows.tokens_of(PIVOT)
        if not step.work or known.checkpoint is None:
            return step
        values = settings.training
        step.rows, step.tokens = self.rows.count, tokens
        step.disk = step.disk_at_most = known.checkpoint.weight_bytes + _small_files(known)
        if tokens is not None:
            # Forward 2 and backward 4 per parameter and token; 2 more to compute activations again; an adapter leaves
            # out the gradients of the weights.
            times = (4 if values.lora is not None else 6) + (2 if values.activation_checkpointing else 0)
            step.pflop = times * self._active(known) * values.num_train_epochs * tokens / 1e15
        if self.trained is not None and self.rows.count:
            batches = math.ceil(self.rows.count / values.per_device_train_batch_size) * values.num_train_epochs
            steps = math.ceil(self.rows.count / values.batch_size) * values.num_train_epochs
            step.seconds = self.trained.load + batches * self.trained.micro_batch + steps * self.trained.step
        return step

    def _training_needs(self, to_make: int) -> None:
        """What distill asks for before it loads the pivot."""
        checkpoint = self.models.pivot.checkpoint
        if checkpoint is None or not to_make:
            return
        longest = self.rows.longest or self.recipe.data.max_length
        needs = training.memory_needs(checkpoint, self.recipe.distill, longest, self.processes)
        needs += training.disk_needs(
            checkpoint, self.recipe.distill, existing_parent(self.place), results=1, download=False
        )
        self.plan.needs += needs
        for step in self.plan.steps:
            if step.stage == "distill" and step.work:
                step.memory = needs[0].needed

    def merge(self) -> None:
        """The merged model, from the pivot's tensors as stand-ins for the targets' if they are to be made yet."""
        section = self.recipe.merge
        if section is None:
            return
        step = self.step("merge", str(section.get("merge_method")))
        targets = [t.folder for t in targets_of(self.recipe.settings, *self._labels_and_place())]
        self.output.merged(step, targets, self.targets_there)
        checkpoint = self.models.pivot.checkpoint
        if not step.work or checkpoint is None:
            return
        from fusekit.plan.merging import expected_needs

        needs = expected_needs(checkpoint, section, len(targets), existing_parent(self.place) / "merged")
        disk, memory = needs
        step.disk = step.disk_at_most = disk.needed
        step.memory = memory.needed
        self.plan.needs += needs

    def _labels_and_place(self) -> tuple[list[str], Path]:
        return [source.label for source in self.recipe.sources], self.output.layout.targets

    @cached_property
    def _held_out(self) -> list[Row]:
        """Rows of local files; what is wrong with them is said once."""
        section = self.recipe.evaluate
        if section is None:
            return []
        paths = [section.path] if isinstance(section.path, str) else section.path
        try:
            there = [path for path in paths if not is_on_hub(path)]
            return list(chain.from_iterable(held_out_rows(path, limit=section.limit) for path in there))
        except FusekitError as error:
            self.plan.refused.append(f"evaluate: {error}")
            return []

    def evaluations(self) -> None:
        """Scores of every model: the held-out rows' tokens at the speed of a capture, replies at that of a sample."""
        section, rows = self.recipe.evaluate, self._held_out
        if section is None:
            return
        names = list(models_of(self.output.context))
        step = self.step("evaluate", f"{len(names)} models")
        done = sum((self.output.layout.evaluation(name) / "manifest.json").is_file() for name in names)
        if done and self.output.is_there:
            step.notes.append(f"{done} are scored already; they are scored again only if they or the rows changed")
        self.output.scores(step)
        if not rows:
            self.plan.unknown.append("evaluate: how many rows are held out")
            return
        step.rows, step.disk = len(rows), SCORE_BYTES * len(names)
        reader = self.models.tokenizers.get(PIVOT)
        try:
            some = rows[:: max(1, len(rows) // 200)]
            tokens = sum(len(reader.tokenize(row)) for row in some) * len(rows) // len(some) if reader else None
        except FusekitError as error:
            self.plan.refused.append(f"evaluate: {error}")
            return
        step.tokens = tokens
        known = {name: self.models.known[name.removeprefix("sources/")] for name in names if name.startswith("sources")}
        each = [known.get(name, self.models.pivot) for name in names]
        if tokens is not None and all(model.checkpoint is not None for model in each):
            step.pflop = sum(2 * self._active(model) for model in each) * tokens / 1e15
        if tokens is not None and all(model.name in self.speeds for model in each):
            step.seconds = sum(self._scoring_seconds(self.speeds[model.name], tokens, len(rows)) for model in each)

    def _scoring_seconds(self, speed: timing.Speed, tokens: int, rows: int) -> float:
        generated = rows * speed.generate if speed.generate is not None else 0.0
        return speed.load + (tokens / speed.tokens if speed.tokens else 0.0) + generated

    def sums(self) -> None:
        """Whole disks against what is free, the machine, and what the sums leave out."""
        plan, out = self.plan, existing_parent(self.place)
        if said := [known.model for known in self.models.known.values() if known.origin == SAID]:
            plan.basis.append(f"not cached and not reachable, so as large as the recipe says: {', '.join(said)}")
        written = sum(step.disk or 0 for step in plan.steps if step.work)
        pivot = self.models.pivot.checkpoint
        to_train = any(step.stage == "distill" and step.work for step in plan.steps)
        work = training.kept_bytes(pivot, self.recipe.distill) if pivot is not None and to_train else 0
        self._disks(int(written), work)
        if any(known.origin == SAID for known in self.models.known.values()) or not self.speeds:
            plan.basis.append("operations are 2 per parameter and token forward, 6 in training; attention comes on top")
        refused = [step for step in plan.steps if step.state == REFUSED]
        plan.refused += [f"{step.stage} {step.name}: {note}" for step in refused for note in step.notes[-1:]]
        limits = min(memory_limits(), key=lambda limit: limit.available)
        plan.machine = {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_free": limits.available,
            "memory_of": limits.source,
            "gpus": _gpus(),
            "disk_free": free_bytes(out),
            "disk_of": str(out),
        }

    def _disks(self, written: int, work: int) -> None:
        """What the whole run writes, and downloads, by disk. work: bytes of it that are there for a while."""
        from huggingface_hub import constants

        out, cache = existing_parent(self.place), existing_parent(Path(constants.HF_HUB_CACHE))
        sizes = {known.model: known.download_bytes for known in self.models.known.values() if known.download_bytes}
        download = f"download of {len(sizes)} model{'s' if len(sizes) > 1 else ''}, {human(sum(sizes.values()))}"
        what = f"disk for the whole run ({human(written)} that stay, {human(work)} of checkpoints for a while"
        together = sizes and cache.stat().st_dev == out.stat().st_dev
        needed = written + work + (sum(sizes.values()) if together else 0)
        what += f", {download})" if together else ")"
        self.plan.needs.append(Need(what, needed, free_bytes(out), f"free on the disk of {out}"))
        if sizes and not together:
            needed = sum(sizes.values())
            self.plan.needs.append(Need(download, needed, free_bytes(cache), f"free on the disk of {cache}"))


def _small_files(known: Known) -> int:
    """Bytes of a checkpoint's files besides its weights: tokenizer, configuration."""
    checkpoint = known.checkpoint
    if checkpoint is None or not checkpoint.folder.is_dir():
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
