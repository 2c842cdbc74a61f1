"""The work of the study: rows and captures once, then a unit per arm and seed. What is there is not made again."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fusion import scores
from benchmarks.fusion.arms import ARMS, FEWER, MERGES, merges_of, recipe_of
from benchmarks.fusion.rows import write_all
from fusekit.disk import commit_file
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.run import distill
from fusekit.errors import FusekitError
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.run import run
from fusekit.pipeline.stage import Context, choice_of, read_rows_file
from fusekit.recipe import Recipe
from fusekit.types import Row

Say = Callable[[str], None]
BITS = "bits_per_byte"


@dataclass(frozen=True)
class Study:
    """Where the study works and how large it is. folder: for everything it makes. recipe: the demo's. rows: per skill.
    questions: held out, per skill. epochs: of every training."""

    folder: Path
    recipe: Path
    rows: int
    questions: int
    epochs: float

    @property
    def held_out(self) -> Path:
        """The held-out questions, a file per skill."""
        return self.folder / "rows" / "held-out"

    @property
    def scores(self) -> Path:
        """A file per scored model and seed."""
        return self.folder / "scores"

    @property
    def captured(self) -> Layout:
        """Rows as all models read them, and what each said about them: the same for every arm and seed."""
        return Layout(self.folder / "captured")

    def arm(self, name: str | None, seed: int = 0) -> Recipe:
        """The recipe of an arm."""
        common = (
            f"data.path={json.dumps(str(self.folder / 'rows' / 'train.jsonl'))}",
            f"distill.num_train_epochs={self.epochs}",
            "distill.batch_size=32",
            "distill.per_device_train_batch_size=8",  # changes the time, not the result
            'distill.save_strategy="no"',
            'distill.logging_strategy="no"',
            "distill.disable_tqdm=true",
        )
        return recipe_of(name, common, seed, self.recipe)

    def score(self, model: str, seed: int | None, choice: Any, say: Say) -> None:
        """Score a model that is not scored yet. Of the many forms of one merge only the bits per byte are counted."""
        if scores.file_of(self.scores, model, seed).exists():
            return
        merge = model.rpartition("/")[2]
        metrics = (BITS,) if merge in MERGES and merge not in FEWER else scores.METRICS
        found = scores.score(choice, self.held_out, self.questions, metrics)
        scores.keep(self.scores, model, seed, found)
        say(f"{model}, seed {seed}: {statistics.fmean(found[BITS].values()):.4f}")


def prepare(study: Study, say: Say) -> None:
    """Write the rows, capture what every model says about them, and score the pivot and the sources.

    Raises FusekitError: the folder was made with other sizes, or another recipe.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    recipe = study.arm(None)
    facts = {"recipe": recipe.model_dump(mode="json"), "rows": study.rows, "questions": study.questions}
    data = json.dumps(facts, indent=1).encode()
    known = study.folder / "study.json"
    if known.exists() and known.read_bytes() != data:
        before = json.loads(known.read_bytes())
        changed = [f"{name}: {before[name]} before, {facts[name]} now" for name in facts if before[name] != facts[name]]
        raise FusekitError(f"{study.folder} was made otherwise ({'; '.join(changed)}): choose another folder")
    commit_file(known, data)
    write_all(study.folder / "rows", study.rows, study.questions)
    run(recipe, study.captured.out, until="capture", say=say, quiet=True)
    context = Context(recipe)
    study.score("pivot", None, choice_of(recipe.pivot), say)
    for name in context.names[1:]:
        study.score(f"sources/{name}", None, choice_of(context.model(name)), say)


def inputs_of(recipe: Recipe, rows: list[Row], captured: Layout, sources: Collection[str]) -> Inputs:
    """What a recipe trains on: rows, and what the pivot and these of its sources said about them."""
    return Inputs(
        choice_of(recipe.pivot),
        rows,
        captured.store(PIVOT),
        {
            source.label: Source(captured.store(source.label), choice_of(source), recipe.alignment_of(source))
            for source in recipe.sources
            if source.label in sources
        },
        Context(recipe).reader(PIVOT),
    )


def train(study: Study, arm: str, seed: int, say: Say) -> list[Path]:
    """Train the targets of an arm that are not trained yet. Returns their folders."""
    recipe, names = study.arm(arm, seed), [source.label for source in study.arm(arm).sources]
    inputs = inputs_of(recipe, read_rows_file(study.captured.data), study.captured, names)
    out = study.folder / "targets" / f"{arm}.{seed}"
    return distill(inputs, recipe.settings, out, resume=True, say=say)


def unit(study: Study, arm: str, seed: int, say: Say) -> None:
    """Train an arm, merge where it makes several targets, and score everything."""
    if all(scores.file_of(study.scores, model, seed).exists() for model in models_of(study, arm)):
        return
    targets = train(study, arm, seed, lambda _line: None)
    pivot = replace(choice_of(study.arm(None).pivot), revision=None)
    if not ARMS[arm].merged:
        study.score(arm, seed, replace(pivot, model=str(targets[0])), say)
        return
    for target in targets:
        study.score(f"{arm}/targets/{target.name}", seed, replace(pivot, model=str(target)), say)
    base = Context(study.arm(None)).checkpoint(PIVOT).folder
    for merge in merges_of(arm):
        _merge(study, arm, seed, merge, base, targets, say)


def models_of(study: Study, arm: str) -> list[str]:
    """The names of the models that a unit scores."""
    if not ARMS[arm].merged:
        return [arm]
    names = [source.label for source in study.arm(arm).sources]
    return [f"{arm}/targets/{name}" for name in names] + [f"{arm}/{merge}" for merge in merges_of(arm)]


def _merge(study: Study, arm: str, seed: int, name: str, base: Path, targets: list[Path], say: Say) -> None:
    """Merge into a folder that goes away once the model is scored."""
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings, merge

    model = f"{arm}/{name}"
    if scores.file_of(study.scores, model, seed).exists():
        return
    pivot = study.arm(None).pivot
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        recipe = Path(folder) / "merge.yml"
        recipe.write_text(yaml.safe_dump(MERGES[name].recipe(base, targets)), encoding="utf-8")
        options = MergeOptions(quiet=True, random_seed=seed)
        merged = merge(recipe, Path(folder) / "merged", options, Settings(say=lambda _line: None))
        study.score(model, seed, replace(choice_of(pivot), model=str(merged.path), revision=None), say)
