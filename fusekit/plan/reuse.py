"""What is in the output already: there and of use, begun, or made from something else. Reads, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.capturing.capture import store_spec, vocabulary_size
from fusekit.capturing.load import dequantised_from
from fusekit.capturing.manifest import MANIFEST, Manifest, keys_hash, read_json
from fusekit.capturing.store import Store
from fusekit.capturing.writer import refuse_foreign
from fusekit.distillation import checkpoints
from fusekit.distillation import outputs as overwriting
from fusekit.distillation.outputs import FACTS, Target, facts_begun
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import FusekitError
from fusekit.pipeline import distilling, evaluating, merging, stages
from fusekit.pipeline.layout import PIVOT, Layout
from fusekit.pipeline.rows_file import read_rows_file
from fusekit.pipeline.stages import Context
from fusekit.plan.figures import GOES_ON, REFUSED, REUSED, TO_DO, Step
from fusekit.plan.models import Models
from fusekit.recipe import Recipe
from fusekit.types import Row

HASHED_BYTES = 40 << 30
"""Weights in folders are read through to be compared with what an artifact was made from, up to this size."""

SHOWN = 4


class Output:
    """The output of a run, compared with a recipe.

    Args:
        recipe: what is to be run.
        out: the folder, which need not exist; None for nothing to compare with.
        models: those that were found.
    """

    def __init__(self, recipe: Recipe, out: Path | None, models: Models) -> None:
        self.recipe, self.models = recipe, models
        self.layout = Layout((out or Path("/nonexistent")).resolve())
        self.is_there = out is not None and out.is_dir()
        self.context = Context(recipe, self.layout, models.readers, lambda _line: None, quiet=True)
        self.rows: list[Row] | None = None
        self._complete: dict[str, Store] = {}

    def pivot(self, step: Step) -> None:
        """Of a pivot that is a GGUF file."""
        folder, choice = self.layout.pivot, self.context.readers.choice(PIVOT)
        self._artifact(step, folder, lambda: dequantised_from(choice, artifact.read(folder)))

    def data(self, step: Step) -> None:
        """Also keeps the rows, where they are there and of use."""
        folder = self.layout.data
        if self._artifact(step, folder, lambda: stages.data_inputs(self.context)) and step.state == REUSED:
            self._try(step, lambda: setattr(self, "rows", read_rows_file(folder)))

    def store(self, step: Step, name: str) -> None:
        """Of a model. Sets the state and, where a part is there, the rows that are still to do."""
        folder = self.layout.store(name)
        if self.is_there and (folder / MANIFEST).is_file():
            self._try(step, lambda: self._store(step, name, folder))
        elif self.is_there and folder.is_dir():
            self._try(step, lambda: refuse_foreign(folder))

    def _store(self, step: Step, name: str, folder: Path) -> None:
        manifest = read_json(folder / MANIFEST, Manifest)
        assert manifest is not None
        checkpoint, reader = self.models.known[name].checkpoint, self.models.tokenizers.get(name)
        if self.rows is None or checkpoint is None or reader is None:
            step.notes.append("a store is there, but cannot be compared: its rows or its model are not at hand")
            return
        if checkpoint.snapshot is None and checkpoint.weight_bytes > HASHED_BYTES:
            step.notes.append("the weights are too large to be read for a plan: taken to be the same")
            wanted_model = manifest.spec.model_fingerprint
        else:
            wanted_model = checkpoint.fingerprint()
        rows = stages.rows_of(self.context, name, self.rows)
        settings = self.context.recipe.capture
        if settings.rows_per_shard is None:
            settings = settings.model_copy(update={"rows_per_shard": manifest.spec.rows_per_shard})
        wanted = store_spec(
            checkpoint, reader, rows, vocabulary_size(checkpoint, reader), settings, fingerprint=wanted_model
        )
        if manifest.spec.model_fingerprint == wanted.model_fingerprint:
            wanted = wanted.model_copy(update={"model": manifest.spec.model})
        changed = manifest.spec.differences(wanted)
        if not changed and keys_hash([row.key for row in rows]) != manifest.keys_xxh3:
            changed = ["rows: others, or in another order"]
        if changed:
            _refuse(step, changed)
            return
        store = Store.open(folder, incomplete=True)
        done = sum(record.stop - record.start for record in store.records)
        if manifest.complete:
            step.state = REUSED
            self._complete[name] = store
        elif done:
            step.state, step.rows = GOES_ON, len(rows) - done
            step.notes.append(f"{done} of {len(rows)} rows are captured")

    def alignment(self, step: Step, source: str) -> None:
        """Of a pair."""
        rows, folder = self.rows, self.layout.alignment(source)
        if rows is not None:
            self._artifact(step, folder, lambda: stages.align_inputs(self.context, source, rows))
        else:
            self._is_free(step, folder)

    def target(self, step: Step, target: Target, settings: DistillSettings) -> None:
        """A published target, or the checkpoints of one that was begun."""
        begun = (target.folder / artifact.MANIFEST).is_file() or (target.work / FACTS).is_file()
        if self._is_free(step, target.folder) and begun:
            self._try(step, lambda: self._target(step, target, settings))

    def _target(self, step: Step, target: Target, settings: DistillSettings) -> None:
        known = artifact.read(target.folder)
        published = known is not None
        before = known.inputs if known is not None else facts_begun(target) or {}
        if self.rows is None or any(name not in self._complete for name in (PIVOT, *target.sources)):
            step.notes.append("it is there, but the stores that it was made from are not: compared once they are")
            return
        if changed := distilling.differences(self.context, target.name, settings, before):
            _refuse(step, changed)
            return
        if published:
            step.state = REUSED
            return
        good = next((at for at, path in checkpoints.checkpoints(target.work) if not _damaged(path)), None)
        if good is not None:
            step.state = GOES_ON
            step.notes.append(f"goes on from step {good}; its figures are those of the whole training")

    def scores(self, step: Step) -> None:
        """Of all models: where they go."""
        for name in evaluating.models_of(self.context):
            if not self._is_free(step, self.layout.evaluation(name)):
                return

    def merged(self, step: Step, targets: list[Path], ready: bool) -> None:
        """The merged model. ready: whether all targets are there and of use."""
        if self.is_there:
            self._try(step, lambda: merging.check_place(self.context))
        if not self.is_there or step.state == REFUSED:
            return
        known = artifact.read(self.layout.merged)
        if known is None:
            return
        if not ready:
            step.notes.append("one is there; it is made anew, in one step, once the targets are")
            return
        found = self._try(step, lambda: stages.merge_inputs(self.context, targets))
        if found is None:
            return
        changed = artifact.differences(known.inputs, artifact.plain(found))
        if not changed:
            step.state = REUSED
        elif known.inputs.get("targets") == found["targets"]:
            _refuse(step, changed)
        else:
            step.notes.append("one of other targets is there; it is made anew, in one step")

    def _artifact(self, step: Step, folder: Path, inputs: Callable[[], artifact.Inputs]) -> bool:
        """Compare an artifact. Returns whether one is there that could be compared."""
        known = artifact.read(folder) if self._is_free(step, folder) else None
        now = self._try(step, inputs) if known is not None else None
        if known is None or now is None:
            return False
        if changed := artifact.differences(known.inputs, now):
            _refuse(step, changed)
        else:
            step.state = REUSED
        return True

    def _is_free(self, step: Step, folder: Path) -> bool:
        """Whether an artifact may come to a folder of the output: it is there already, or nothing is; else refuse."""
        if self.is_there and not overwriting.is_former(folder):
            self._try(step, lambda: artifact.refuse_occupied(folder))
        return self.is_there and step.state != REFUSED

    def _try(self, step: Step, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; an error becomes the step's."""
        try:
            return work()
        except (FusekitError, OSError, ValueError) as error:
            step.state = REFUSED
            step.notes.append(str(error))
            return None


def foreign(layout_folder: Path) -> str | None:
    """Why a folder cannot be an output of ``fusekit run``, None where it can."""
    from fusekit.pipeline.run import foreign_to_runs

    if not layout_folder.exists():
        return None
    if not layout_folder.is_dir():
        return f"{layout_folder} is a file, not a folder"
    try:
        return foreign_to_runs(Layout(layout_folder.resolve()))
    except OSError as error:
        return f"{layout_folder} cannot be read: {error.strerror or error}"


def _damaged(checkpoint: Path) -> bool:
    return bool(checkpoints.problems_of(checkpoint, hashes=False))


def _refuse(step: Step, changed: list[str]) -> None:
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    step.state = REFUSED
    step.notes.append("made from something else: " + "; ".join(changed[:SHOWN]) + more)


def step_for(stage: str, name: str) -> Step:
    """A step of which nothing is there."""
    return Step(stage, name, TO_DO)
