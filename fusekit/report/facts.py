"""What the report knows of a run: what its folder holds for the recipe, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fusekit import artifacts as artifact
from fusekit.alignment.quality import AlignmentQuality, Sample
from fusekit.artifacts import weights_hash
from fusekit.capturing.store import Store
from fusekit.data.reading import DataCounts
from fusekit.errors import FusekitError, StorageError
from fusekit.layout import BASELINE, MERGED, PIVOT, TRAINING, Layout
from fusekit.recipe import load_recipe
from fusekit.report import text

if TYPE_CHECKING:
    from fusekit.capturing.models import Checkpoint

Loaded = TypeVar("Loaded")


class _Record(BaseModel):
    """What the report reads of a JSON file; a value of a wrong type is a damaged file."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class ModelFacts(_Record):
    """The pivot or a source in ``models.json``. repository, commit: on the hub. tokenizer: in words."""

    model: str
    repository: str | None = None
    commit: str | None = None
    architecture: str = ""
    parameters: int | None = None
    tokenizer: str = ""


class Judged(_Record):
    """``judged/counts.json``: votes by judge and model, and how many questions each model has won."""

    votes: dict[str, dict[str, int]]
    won: dict[str, int]


class CaseWorth(_Record):
    """Labels of one case: how many, and nats per label of the teacher and of the pivot."""

    labels: int
    teacher: float | None = None
    pivot: float | None = None
    worse: bool = False


class Worth(_Record):
    """``alignment/SOURCE/worth.json`` (:class:`fusekit.distillation.worth.TeacherWorth`)."""

    examples: int
    cases: dict[str, CaseWorth]
    summary: str
    warnings: list[str]


class Training(_Record):
    """``training.json`` of a distilled model (:mod:`fusekit.distillation.run`)."""

    sources: list[str] = []
    unmatched: dict[str, list[str]] = {}
    counts: dict[str, float] = {}
    skipped_steps: int = 0
    log: list[dict[str, Any]] = []

    def points(self, name: str) -> list[tuple[float, float]]:
        """``(step, value)`` of the lines of the log that have a finite value of this name."""
        values = ((line.get("step"), line.get(name)) for line in self.log)
        return [
            (float(step), float(value))
            for step, value in values
            if isinstance(step, (int, float)) and isinstance(value, (int, float)) and abs(value) < float("inf")
        ]

    def last(self, name: str) -> float | None:
        """The last finite value of this name in the log."""
        return next((value for _, value in reversed(self.points(name))), None)


class Tensor(_Record):
    """How one tensor was merged."""

    method: str
    coefficients: dict[str, float]


class Coefficients(_Record):
    """``merged/coefficients.json``, as :class:`fusekit.merge_methods.MergeRecord`, which would import mergekit."""

    tensors: dict[str, Tensor]


class Results(_Record):
    """``results.json``: model -> metric -> skill -> value; what each task of lm-eval measures."""

    models: dict[str, dict[str, dict[str, float | None]]]
    lm_eval: dict[str, dict[str, Any]] = {}


class Facts:
    """A run, finished or not. Nothing large is read: models are told apart by the hashes in their manifests.

    Attributes:
        layout, recipe, sources: where it is, its recipe, and the names of the sources.
        wanted, training: the distilled models that the recipe asks for, and those whose training is not finished.
        models, stores: of the pivot and the sources, by name; a store may be unfinished.
        qualities, samples, worths: of alignments, by source.
        targets, baseline: training records of distilled models, by name, and of plain fine-tuning.
        coefficients: of the merged model, None where there is none of this recipe.
        results: scores of the models that are there now.
        artifacts: manifests by place in the folder.
        left_out: what belongs to other models than the recipe's, a sentence each.
        problems: what cannot be read, a line each.

    Raises StorageError: ``out`` is not the output of a run; RecipeError: its recipe cannot be read.
    """

    def __init__(self, out: Path) -> None:
        self.layout = layout = Layout(out.resolve())
        if not layout.recipe.is_file():
            raise StorageError(f"{layout.out} is not the output of a run: it has no {layout.recipe.name}")
        self.recipe = load_recipe(layout.recipe)
        self.sources = [source.label for source in self.recipe.sources]
        self.entries = self.recipe.models
        self.wanted = self.recipe.targets
        self.left_out: list[str] = []
        self.problems: list[str] = []
        self.models = self._record(layout.models, dict[str, ModelFacts]) or {}
        self.counts = self._record(layout.data / "counts.json", DataCounts, "seen", "kept")
        self.judged = self._record(layout.judged / "counts.json", Judged) if self.recipe.respond else None
        self.stores = self._each(
            self.entries, lambda name: self._tried(layout.store(name), lambda path: Store.open(path, incomplete=True))
        )
        needs = ("texts", "pivot_tokens", "source_tokens", "cases", "scripts")
        self.qualities = self._each(
            self.sources, lambda name: self._record(layout.alignment(name) / "quality.json", AlignmentQuality, *needs)
        )
        self.samples = self._each(
            self.sources, lambda name: self._record(layout.alignment(name) / "samples.json", list[Sample])
        )
        self.worths = self._each(self.sources, lambda name: self._record(layout.worth(name), Worth))
        self.targets = self._each(
            self.wanted, lambda name: self._record(layout.targets / name / "training.json", Training)
        )
        begun = [name for name in self.wanted if (layout.targets / f"{name}{TRAINING}").is_dir()]
        self.training = [name for name in begun if name not in self.targets]
        self.baseline = self._record(layout.baselines / "sft" / "training.json", Training)
        self.artifacts = self._each(self._places(), self._manifest)
        self._leave_out_another_merge()
        merged = MERGED in self.artifacts
        self.coefficients = self._record(layout.merged / "coefficients.json", Coefficients) if merged else None
        self.results = self._results()

    @property
    def trained(self) -> dict[str, Training]:
        """Training records of distilled models and plain fine-tuning, by their names in the results."""
        found = {f"targets/{name}": record for name, record in self.targets.items()}
        return found | ({BASELINE: self.baseline} if self.baseline is not None else {})

    def model(self, name: str) -> ModelFacts:
        """What is known of the pivot or a source."""
        return self.models.get(name) or ModelFacts(model=self.entries[name].path)

    def _places(self) -> list[str]:
        """Where the artifacts of the recipe are, in the order of the stages."""
        captured = [f"responses/{name}" for name in self.entries] if self.recipe.respond else []
        places = ["data", *captured, "judged", *(f"alignment/{name}" for name in self.sources)]
        places += [f"targets/{name}" for name in self.wanted] + ["baselines/sft", MERGED]
        models = [f"sources/{name}" for name in self.sources] + [f"targets/{name}" for name in self.wanted]
        return places + [f"evaluation/{name}" for name in (PIVOT, BASELINE, *models, MERGED)]

    def _manifest(self, place: str) -> artifact.Artifact | None:
        return self._tried(self.layout.out / place / artifact.MANIFEST, lambda file: artifact.read(file.parent))

    def _changed(self, place: str, weights: object) -> bool:
        """Whether a model of the run has other weights by now; one that is gone has not."""
        return place in self.artifacts and weights_hash(self.layout.out / place) != weights

    def _leave_out_another_merge(self) -> None:
        if (merged := self.artifacts.get(MERGED)) is None:
            return
        used = merged.inputs.get("targets") or {}
        changed = any(self._changed(f"targets/{name}", used.get(name)) for name in self.wanted)
        if self.recipe.merge is None or set(used) != set(self.wanted) or changed:
            self.left_out.append(
                f"merged/ is left out, and its card stays as it is: it was merged from {text.listed(sorted(used))}, "
                f"not from the recipe's distilled models as they are now ({text.listed(self.wanted)})."
            )
            del self.artifacts[MERGED]

    def _results(self) -> Results | None:
        found = self._record(self.layout.results, Results)
        if found is None or self.recipe.evaluate is None:
            return None
        given = [PIVOT, *(f"sources/{name}" for name in self.sources)]
        places = {f"targets/{name}": f"targets/{name}" for name in self.wanted} | {BASELINE: "baselines/sft"}
        places |= {MERGED: MERGED} if MERGED in self.artifacts else {}

        def is_current(name: str, shown: dict[str, dict[str, float | None]]) -> bool:
            own = self._record(self.layout.evaluation(name) / "scores.json", dict[str, dict[str, float | None]]) or {}
            if any(json.dumps(shown.get(metric, of)) != json.dumps(of) for metric, of in own.items()):
                return False  # scored again, by a run that did not come to writing all results
            scores = self.artifacts.get(f"evaluation/{name}")
            if name in given or name not in places or scores is None:
                return name in given
            return not self._changed(places[name], scores.inputs.get("model"))

        kept = {name: scores for name, scores in found.models.items() if is_current(name, scores)}
        if gone := [name for name in found.models if name not in kept]:
            why = "the run has other models or newer scores"
            self.left_out.append(f"The scores of {text.listed(gone)} are left out: {why}.")
        return found.model_copy(update={"models": kept})

    def _tried(self, path: Path, load: Callable[[Path], Loaded]) -> Loaded | None:
        """``load(path)``; None where the path does not exist, or is damaged, which becomes a problem."""
        if not path.exists():
            return None
        try:
            return load(path)
        except (FusekitError, OSError, ValueError, RecursionError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).partition("\n")[0]
            self.problems.append(f"{path.relative_to(self.layout.out)}: {said.replace(f'{self.layout.out}/', '')}")
            return None

    def _record(self, path: Path, kind: type[Loaded], *needs: str) -> Loaded | None:
        """A value from JSON, unknown keys ignored. needs: keys that have to be there though the class has a default."""

        def load(file: Path) -> Loaded:
            value = json.loads(file.read_bytes())
            found = TypeAdapter(kind).validate_python(value)
            if lacking := [name for name in needs if name not in value]:
                raise ValueError(f"it lacks {text.listed(lacking)}")
            return found

        return self._tried(path, load)

    @staticmethod
    def _each(names: Iterable[str], load: Callable[[str], Loaded | None]) -> dict[str, Loaded]:
        return {name: value for name in names if (value := load(name)) is not None}


def facts_of(checkpoint: Checkpoint, tokenizer: Any) -> ModelFacts:
    """Describe a model by its configuration, the size of its weights, and its tokenizer."""
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.surfaces import Form, Kind
    from fusekit.capturing import models

    try:
        surfaces = vocabulary_surfaces(tokenizer)
        form = Form(surfaces.form).name.lower().replace("_", "-")
        model = type(surfaces.backend.model).__name__
        reads = f"{form} {model}, {(surfaces.kinds != Kind.HOLE).sum():,} tokens"
    except FusekitError:  # a tokenizer whose vocabulary cannot be read
        reads = ""
    return ModelFacts(
        model=checkpoint.choice.model,
        repository=checkpoint.repository,
        commit=checkpoint.commit,
        architecture=next(iter(checkpoint.config.get("architectures") or ()), ""),
        parameters=checkpoint.gguf.parameters if checkpoint.gguf else models.parameters(checkpoint),
        tokenizer=reads,
    )
