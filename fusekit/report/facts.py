"""The one reader of a run: what its folder holds for the recipe, what is missing, and what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from fusekit import artifacts as artifact
from fusekit import yaml as safe_yaml
from fusekit.alignment.quality import Sample, read_samples
from fusekit.artifacts import Artifact, weights_hash
from fusekit.capturing.store import Store
from fusekit.distillation.outputs import targets_of
from fusekit.errors import FusekitError, StorageError
from fusekit.layout import BASELINE, MERGED, PIVOT, Layout
from fusekit.recipe import Recipe
from fusekit.recipe.sections import last_part
from fusekit.report import text
from fusekit.report.models import ModelFacts, read_models

TRAINING = "training.json"
COEFFICIENTS = "coefficients.json"
BASELINE_PLACE = "baselines/sft"

Loaded = TypeVar("Loaded")


class _Record(BaseModel):
    """What the report needs of a JSON file; other keys are ignored, and a wrong type is a damaged file."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Record = TypeVar("Record", bound=BaseModel)


class Counts(_Record):
    """``data/counts.json``: what became of the examples (:class:`fusekit.data.counts.DataCounts`)."""

    seen: int
    kept: int
    reasons: dict[str, int] = {}
    keys: dict[str, list[str]] = {}
    first_refusal: str = ""
    unused: dict[str, int] = {}


class Judged(_Record):
    """``judged/counts.json``: votes by judge and model, and how many questions each model has won."""

    votes: dict[str, dict[str, int]]
    won: dict[str, int]


class Share(_Record):
    """Pivot positions of an alignment: how many, and the shares that are linked and that get a row."""

    positions: int
    linked_share: float
    row_share: float


class Worst(_Record):
    """A text that loses much, and the share of its positions that get a row."""

    row_share: float
    text: str


class Quality(Share):
    """``alignment/SOURCE/quality.json`` (:class:`fusekit.alignment.quality.AlignmentQuality`)."""

    pivot: str
    source: str
    texts: int
    pivot_tokens: int
    source_tokens: int
    cases: dict[str, int]
    groups: dict[str, int] = {}
    scripts: dict[str, Share] = {}
    data: dict[str, Share] = {}
    worst: list[Worst] = []


class CaseWorth(_Record):
    """Labels of one case: how many, nats per label of the teacher and of the pivot, None where there are none."""

    labels: int
    teacher: float | None = None
    pivot: float | None = None
    worse: bool = False


class Worth(_Record):
    """``alignment/SOURCE/worth.json`` (:class:`fusekit.alignment.quality.TeacherWorth`)."""

    vocabulary: str
    tokens: str
    tail: str
    examples: int
    ratio: float | None = None
    cases: dict[str, CaseWorth]
    summary: list[str]
    warnings: list[str]


class Training(_Record):
    """``training.json`` of a target (:mod:`fusekit.distillation.run`)."""

    target: str
    sources: list[str] = []
    settings: dict[str, Any] = {}
    made_from: dict[str, Any] = {}
    rows: list[str] = []
    unmatched: dict[str, list[str]] = {}
    counts: dict[str, float] = {}
    skipped_steps: int = 0
    log: list[dict[str, Any]] = []

    def points(self, name: str) -> list[tuple[float, float]]:
        """``(step, value)`` of every line of the log where both are finite."""
        return [
            (float(step), float(value))
            for line in self.log
            if "loss" in line and _finite(step := line.get("step")) and _finite(value := line.get(name))
        ]

    def last(self, name: str) -> float | None:
        """The last finite value of this name in the log."""
        return next((float(value) for line in reversed(self.log) if _finite(value := line.get(name))), None)


class Tensor(_Record):
    """How one tensor was merged (:class:`fusekit.merge_methods.provenance.TensorRecord`)."""

    method: str
    coefficients: dict[str, float]
    selected: float | None = None
    erased: dict[str, float] | None = None


class Coefficients(_Record):
    """``merged/coefficients.json``."""

    tensors: dict[str, Tensor]


class Task(_Record):
    """A task of lm-eval: the metric of its figure, and which way it is better."""

    metric: str = ""
    higher_is_better: bool | None = None


class Results(_Record):
    """``results.json``: model -> metric -> skill -> value; what each task of lm-eval measures."""

    models: dict[str, dict[str, dict[str, float | None]]]
    lm_eval: dict[str, Task] = {}


class Scores(RootModel[dict[str, dict[str, float | None]]]):
    """``evaluation/MODEL/scores.json``: metric -> skill -> value."""


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


@dataclass(frozen=True)
class Facts:
    """A run.

    Attributes:
        layout: where it is.
        recipe: every value of it.
        sources: names, in the recipe's order.
        models: the pivot and the sources, as far as ``models.json`` describes them.
        counts: what became of the examples.
        judged: the votes on the models' own answers.
        stores: captures by model, also unfinished ones. captures: how long they took.
        qualities, samples, worths: alignments by source.
        targets: training records of the recipe's targets, by name.
        training: names of targets whose training has begun but is not finished.
        baseline: plain fine-tuning on the same examples.
        merged: manifest of the merged model; merge_recipe: mergekit's; coefficients: by tensor. All None where the
            merged model is not the recipe's.
        results: scores of the models that are there now.
        artifacts: manifests by place in the folder.
        left_out: what belongs to an earlier recipe and is not shown, a sentence each.
        problems: what cannot be read, a line each.
    """

    layout: Layout
    recipe: dict[str, Any]
    sources: list[str]
    models: dict[str, ModelFacts] = field(default_factory=dict)
    counts: Counts | None = None
    judged: Judged | None = None
    stores: dict[str, Store] = field(default_factory=dict)
    captures: dict[str, dict[str, Any]] = field(default_factory=dict)
    qualities: dict[str, Quality] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    worths: dict[str, Worth] = field(default_factory=dict)
    targets: dict[str, Training] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    baseline: Training | None = None
    merged: Artifact | None = None
    merge_recipe: dict[str, Any] | None = None
    coefficients: Coefficients | None = None
    results: Results | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def value(self, path: str) -> Any:
        """A value of the recipe, as ``fusion.mode``; None where there is none."""
        found: Any = self.recipe
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def model_name(self, name: str) -> str:
        """What the recipe calls the model of the pivot or a source."""
        if name == PIVOT:
            return model_path(self.recipe["pivot"])
        return next((model_path(entry) for entry in self.recipe["sources"] if source_name(entry) == name), name)

    @property
    def trained(self) -> dict[str, Training]:
        """Training records of targets and baseline, by their place in the folder."""
        found = {f"targets/{name}": record for name, record in self.targets.items()}
        return found | ({BASELINE_PLACE: self.baseline} if self.baseline is not None else {})


def source_name(entry: Mapping[str, Any]) -> str:
    """What a run calls a source (:attr:`fusekit.recipe.sections.Source.label`)."""
    return str(entry.get("name") or last_part(model_path(entry)))


def model_path(entry: Mapping[str, Any]) -> str:
    """The model of the pivot or a source (:attr:`fusekit.recipe.sections.Pivot.path`)."""
    model, file = str(entry.get("model", "")), entry.get("gguf_file")
    return f"{model.rstrip('/')}/{file}" if file else model


def merged_targets(merged: Artifact) -> dict[str, str]:
    """The targets that a merged model was made from, and the hashes of their weights."""
    used = merged.inputs.get("targets")
    return {str(name): str(known) for name, known in used.items()} if isinstance(used, dict) else {}


def read_facts(out: Path) -> Facts:
    """Read a run, finished or not. Nothing large is read: models are told apart by the hashes in their manifests.

    Raises StorageError: ``out`` is not the output of a run, or its recipe is damaged. Anything else that cannot be read
    is left out and named in ``problems``.
    """
    return _Reader(Layout(out.resolve())).read()


@dataclass
class _Reader:
    layout: Layout
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def read(self) -> Facts:
        layout, recipe = self.layout, _recipe(self.layout)
        sources = [source_name(entry) for entry in recipe["sources"]]
        wanted = _target_names(recipe, layout)
        targets = self.each(wanted, lambda name: layout.targets / name, lambda p: self.record(p / TRAINING, Training))
        begun = sorted(path.name.removesuffix(".training") for path in layout.targets.glob("*.training"))
        artifacts = self.artifacts(sources, wanted)
        merged = self.merged(recipe, artifacts, wanted)
        baseline = self.record(layout.out / BASELINE_PLACE / TRAINING, Training)
        # What may have been scored, with a hash for a target that is there no more but was merged.
        models = dict.fromkeys([PIVOT, *(f"sources/{name}" for name in sources)])
        models |= {BASELINE: None} if baseline else {}
        models |= {f"targets/{name}": None for name in targets}
        if merged is not None:
            models |= {f"targets/{name}": known for name, known in merged_targets(merged).items()}
            models |= {MERGED: None}
        merge_recipe = self.tried(layout.merge_recipe, _mapping)
        return Facts(
            layout,
            recipe,
            sources,
            models=self.tried(layout.models, read_models) or {},
            counts=self.record(layout.data / "counts.json", Counts),
            judged=self.record(layout.judged / "counts.json", Judged) if recipe.get("respond") else None,
            stores=self.each([PIVOT, *sources], layout.store, lambda p: Store.open(p, incomplete=True)),
            captures=self.tried(layout.times, _captures) or {},
            qualities=self.each(sources, layout.alignment, lambda p: self.record(p / "quality.json", Quality)),
            samples=self.each(sources, layout.alignment, lambda p: read_samples(p / "samples.json")),
            worths=self.each(sources, layout.worth, lambda path: self.record(path, Worth)),
            targets=dict(sorted(targets.items(), key=lambda item: _place(item[0], sources))),
            training=[name for name in begun if name not in targets and not name.startswith(".")],
            baseline=baseline,
            merged=merged,
            merge_recipe=merge_recipe if merged else None,
            coefficients=self.record(layout.merged / COEFFICIENTS, Coefficients) if merged else None,
            results=self.results(recipe, models, artifacts),
            artifacts=artifacts,
            left_out=self.left_out,
            problems=self.problems,
        )

    def merged(self, recipe: dict[str, Any], artifacts: dict[str, Artifact], wanted: list[str]) -> Artifact | None:
        """The manifest of the merged model if it is the recipe's; else it counts as absent."""
        merged = artifacts.get(MERGED)
        why = merged and self.why_not_merged(recipe, merged, wanted)
        if not why:
            return merged
        self.left_out.append(f"The merged model in merged/ is left out, and its card is not changed: {why}.")
        del artifacts[MERGED]
        return None

    def why_not_merged(self, recipe: Mapping[str, Any], merged: Artifact, targets: Collection[str]) -> str | None:
        """Why a merged model is not the recipe's, None where it is. A target that is gone counts as unchanged."""
        if recipe.get("merge") is None:
            return "the recipe has no merge"
        used = merged_targets(merged)
        if set(used) != set(targets):
            made_from, wanted = text.listed(sorted(used)) or "unknown targets", text.listed(sorted(targets))
            return f"it was merged from {made_from}, but the recipe's targets are {wanted}"
        changed = [name for name in targets if self.weights(f"targets/{name}") not in (None, used[name])]
        return f"targets changed after the merge ({text.listed(changed)})" if changed else None

    def results(
        self, recipe: dict[str, Any], models: dict[str, str | None], artifacts: dict[str, Artifact]
    ) -> Results | None:
        """The scores of the models that are there now; those of others are left out."""
        found = self.record(self.layout.results, Results)
        if found is None:
            return None
        if recipe.get("evaluate") is None:
            self.left_out.append("The scores in results.json are left out: the recipe has no evaluation.")
            return None
        reasons: dict[str, list[str]] = {}
        kept = {}
        for name, scores in found.models.items():
            known = artifacts.get(f"evaluation/{name}") if name in models else None
            if why := self.why_not_scored(name, scores, models, known):
                reasons.setdefault(why, []).append(name)
                artifacts.pop(f"evaluation/{name}", None)
            else:
                kept[name] = scores
        self.left_out += [f"The scores of {text.listed(who)} are left out: {why}." for why, who in reasons.items()]
        return found.model_copy(update={"models": kept})

    def why_not_scored(
        self, name: str, scores: Mapping[str, Any], models: Mapping[str, str | None], known: Artifact | None
    ) -> str | None:
        """Why scores in ``results.json`` are not those of the model that is there now; None where they are."""
        if name not in models:
            return "the recipe has no such model, or it is missing"
        own = self.record(self.layout.evaluation(name) / "scores.json", Scores)
        if name != PIVOT and not name.startswith("sources/"):
            now = self.weights(BASELINE_PLACE if name == BASELINE else name) or models[name]
            if now != (known.inputs.get("model") if known is not None else None):
                return "they were measured on an earlier model"
        held_out = {metric: values for metric, values in scores.items() if metric != "lm_eval"}
        if own is not None and json.dumps(own.root) != json.dumps(held_out):
            return "there are newer ones, which results.json does not have yet"
        return None

    def weights(self, place: str) -> str | None:
        """Hash of a model's weights; None where there is no manifest, or a damaged one."""
        try:
            return weights_hash(self.layout.out / place)
        except StorageError:
            return None

    def tried(self, path: Path, load: Callable[[Path], Loaded]) -> Loaded | None:
        """``load(path)``; None where the path does not exist, or is damaged, which becomes a problem."""
        if not path.exists():
            return None
        try:
            return load(path)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            self.damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except (FusekitError, OSError, ValueError, RecursionError) as error:
            self.damaged(path, str(error))
        return None

    def damaged(self, path: Path, why: str) -> None:
        place = path.relative_to(self.layout.out)
        said = why.splitlines()[0].replace(f"{self.layout.out}/", "")
        self.problems.append(f"{place}: {said.removeprefix(f'{place}: ')}")

    def record(self, path: Path, kind: type[Record]) -> Record | None:
        return self.tried(path, lambda file: kind.model_validate(json.loads(file.read_bytes())))

    def each(
        self, names: list[str], folder: Callable[[str], Path], load: Callable[[Path], Loaded | None]
    ) -> dict[str, Loaded]:
        found = {name: self.tried(folder(name), load) for name in names}
        return {name: value for name, value in found.items() if value}

    def artifacts(self, sources: list[str], targets: list[str]) -> dict[str, Artifact]:
        """Manifests in the order of the stages; of alignments and targets those that the recipe has."""
        layout = self.layout
        folders = [layout.data, *(layout.responses(name) for name in [PIVOT, *sources]), layout.judged]
        folders += [*(layout.alignment(name) for name in sorted(sources))]
        folders += [layout.targets / name for name in sorted(targets)]
        folders += [*sorted(layout.baselines.glob("*")), layout.merged]
        folders += sorted(path.parent for path in layout.evaluation("x").parent.rglob(artifact.MANIFEST))
        found = {}
        for folder in folders:
            if not folder.name.startswith("."):
                known = self.tried(folder / artifact.MANIFEST, lambda file: artifact.read(file.parent))
                if known is not None:
                    found[folder.relative_to(layout.out).as_posix()] = known
        return found


def _target_names(recipe: Mapping[str, Any], layout: Layout) -> list[str]:
    """The targets that a recipe asks for; all that exist where this version cannot read the recipe."""
    try:
        known = Recipe.model_validate(recipe)
        names = [source.label for source in known.sources]
        return [target.name for target in targets_of(known.settings, names, layout.targets)]
    except (ValidationError, FusekitError):
        there = [path.name for path in layout.targets.glob("*")]
        return sorted(name for name in there if not name.startswith(".") and not name.endswith(".training"))


def _recipe(layout: Layout) -> dict[str, Any]:
    if not layout.recipe.is_file():
        raise StorageError(f"{layout.out} is not the output of a run: it has no {layout.recipe.name}")
    recipe = _mapping(layout.recipe)
    sources = recipe.get("sources")
    if not isinstance(recipe.get("pivot"), dict) or not isinstance(sources, list):
        raise StorageError(f"{layout.recipe} is damaged: it has no pivot, or no sources")
    if not all(isinstance(entry, dict) and source_name(entry) for entry in sources):
        raise StorageError(f"{layout.recipe} is damaged: a source has no model")
    if unsafe := [name for name in map(source_name, sources) if name in (".", "..") or "/" in name or "\0" in name]:
        raise StorageError(f"{layout.recipe} is damaged: {unsafe[0]!r} cannot be the name of a source")
    return recipe


def _mapping(path: Path) -> dict[str, Any]:
    data = safe_yaml.load(path).data
    if not isinstance(data, dict):
        raise StorageError(f"{path} is damaged: it is not a mapping")
    return data


def _captures(path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise StorageError(f"{path} is damaged: it is not a mapping")
    return {str(name): dict(made) for name, made in found.items() if isinstance(made, dict)}


def _place(target: str, sources: list[str]) -> tuple[int, str]:
    return (sources.index(target) if target in sources else len(sources), target)
