"""Everything that a report says, read from the folder of a run: what is there, what is not, and what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fusekit import artifacts as artifact
from fusekit import yaml as safe_yaml
from fusekit.alignment.samples import Sample, read_samples
from fusekit.artifacts import Artifact
from fusekit.capturing.store import Store
from fusekit.errors import FusekitError, StorageError
from fusekit.pipeline.layout import BASELINE, MERGED, PIVOT, Layout
from fusekit.recipe.sections import last_part
from fusekit.report import present, text
from fusekit.report.models import ModelFacts, read_models
from fusekit.report.records import Coefficients, Counts, Quality, Results, Scores, Training, Worth

TRAINING = "training.json"
COEFFICIENTS = "coefficients.json"

Loaded = TypeVar("Loaded")
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Facts:
    """A run.

    Attributes:
        layout: where it is.
        recipe: every value of it.
        sources: names, in the recipe's order.
        models: of the pivot and the sources, as far as they were noted down.
        counts: of the rows of data.
        stores: by model; those that are not finished too.
        qualities, samples: of alignments, by source. worths: what the source is worth as a teacher.
        targets: what the trained models of the recipe were made from, by name.
        training: names of targets that are being trained, or were when the run was stopped.
        baseline: plain fine-tuning on the same rows.
        merged: the manifest of the merged model. merge_recipe: mergekit's. coefficients: by tensor. All None where
            what is there was merged from other targets than the recipe's, or the recipe merges nothing.
        results: scores of the models that are there now.
        artifacts: manifests by place in the folder. captures: times of stores.
        others: what is there of an earlier recipe and is left out, a sentence each.
        problems: what cannot be read, a line each.
    """

    layout: Layout
    recipe: dict[str, Any]
    sources: list[str]
    models: dict[str, ModelFacts] = field(default_factory=dict)
    counts: Counts | None = None
    stores: dict[str, Store] = field(default_factory=dict)
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
    captures: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def value(self, path: str) -> Any:
        """A value of the recipe, ``fusion.mode``; None where there is none."""
        found: Any = self.recipe
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def model_name(self, name: str) -> str:
        """What the recipe calls the model of the pivot or a source."""
        if name == PIVOT:
            return model_path(self.recipe["pivot"])
        return next((model_path(entry) for entry in self.recipe["sources"] if source_name(entry) == name), name)


def source_name(entry: Mapping[str, Any]) -> str:
    """What a run calls a source (:attr:`fusekit.recipe.sections.Source.label`)."""
    return str(entry.get("name") or last_part(model_path(entry)))


def model_path(entry: Mapping[str, Any]) -> str:
    """The model of the pivot or a source (:attr:`fusekit.recipe.sections.Pivot.path`)."""
    model, file = str(entry.get("model", "")), entry.get("gguf_file")
    return f"{model.rstrip('/')}/{file}" if file else model


def read_facts(out: Path) -> Facts:
    """Read a run, finished or not.

    Raises StorageError: ``out`` is no run of fusekit, or its recipe is damaged. What else cannot be read is left out
    and said in ``problems``.
    """
    return _Reader(Layout(out.resolve())).read()


@dataclass
class _Reader:
    layout: Layout
    problems: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def read(self) -> Facts:
        layout, recipe = self.layout, _recipe(self.layout)
        sources = [source_name(entry) for entry in recipe["sources"]]
        wanted = present.target_names(recipe, layout)
        targets = self.each(wanted, lambda name: layout.targets / name, lambda p: self.record(p / TRAINING, Training))
        begun = sorted(path.name.removesuffix(".training") for path in layout.targets.glob("*.training"))
        artifacts = self.artifacts(sources, wanted)
        merged = self.merged(recipe, artifacts, wanted)
        merge_recipe = self.tried(layout.merge_recipe, lambda: _mapping(layout.merge_recipe))
        baseline = self.record(layout.baselines / "sft" / TRAINING, Training)
        models = dict.fromkeys([PIVOT, *(f"sources/{name}" for name in sources)])
        models |= {BASELINE: None} if baseline else {}
        models |= {f"targets/{name}": None for name in targets}
        if merged is not None:
            models |= {f"targets/{name}": made for name, made in present.merged_targets(merged).items()}
            models |= {MERGED: None}
        return Facts(
            layout,
            recipe,
            sources,
            models=self.tried(layout.models, lambda: read_models(layout.models)) or {},
            counts=self.record(layout.data / "counts.json", Counts),
            stores=self.each([PIVOT, *sources], layout.store, lambda p: Store.open(p, incomplete=True)),
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
            captures=self.tried(layout.times, lambda: _captures(layout.times)) or {},
            others=self.others,
            problems=self.problems,
        )

    def merged(self, recipe: dict[str, Any], artifacts: dict[str, Artifact], wanted: list[str]) -> Artifact | None:
        """The manifest of the merged model if it is the recipe's; else it is said, and is no artifact of the run."""
        merged = artifacts.get(MERGED)
        why = merged and present.merged_of_others(recipe, self.layout, merged, wanted)
        if not why:
            return merged
        self.others.append(f"The merged model in merged/ is left out, and its card is not touched: {why}.")
        del artifacts[MERGED]
        return None

    def results(
        self, recipe: dict[str, Any], models: dict[str, str | None], artifacts: dict[str, Artifact]
    ) -> Results | None:
        """The scores of models that are there now."""
        found = self.record(self.layout.results, Results)
        if found is None:
            return None
        if recipe.get("evaluate") is None:
            self.others.append("The scores in results.json are left out: the recipe has no evaluation.")
            return None
        scored = {
            name: (
                artifacts.get(f"evaluation/{name}"),
                self.record(self.layout.evaluation(name) / "scores.json", Scores),
            )
            for name in models
        }
        reasons: dict[str, list[str]] = {}
        for name, why in present.scores_of_others(self.layout, found, scored, models).items():
            reasons.setdefault(why, []).append(name)
            artifacts.pop(f"evaluation/{name}", None)
        self.others += [f"The scores of {text.listed(who)} are left out: {why}." for why, who in reasons.items()]
        left = {name for names in reasons.values() for name in names}
        return found.model_copy(update={"models": {n: s for n, s in found.models.items() if n not in left}})

    def tried(self, path: Path, load: Callable[[], Loaded]) -> Loaded | None:
        """What ``load`` returns; None where the path is not there, or is damaged, which is then said."""
        if not path.exists():
            return None
        try:
            return load()
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
        return self.tried(path, lambda: kind.model_validate(json.loads(path.read_bytes())))

    def each(
        self, names: list[str], folder: Callable[[str], Path], load: Callable[[Path], Loaded | None]
    ) -> dict[str, Loaded]:
        found = {name: self.tried(folder(name), lambda name=name: load(folder(name))) for name in names}  # type: ignore[misc]
        return {name: value for name, value in found.items() if value}

    def artifacts(self, sources: list[str], targets: list[str]) -> dict[str, Artifact]:
        """Manifests of stages, in the order of the stages; of pairs and targets those that the recipe has."""
        layout = self.layout
        folders = [layout.data, *(layout.alignment(name) for name in sorted(sources))]
        folders += [layout.targets / name for name in sorted(targets)]
        folders += [*sorted(layout.baselines.glob("*")), layout.merged]
        folders += sorted(path.parent for path in layout.evaluation("x").parent.rglob(artifact.MANIFEST))
        found = {}
        for folder in folders:
            if (folder / artifact.MANIFEST).is_file() and not folder.name.startswith("."):
                known = self.tried(folder / artifact.MANIFEST, lambda folder=folder: artifact.read(folder))  # type: ignore[misc]
                if known is not None:
                    found[folder.relative_to(layout.out).as_posix()] = known
        return found


def _recipe(layout: Layout) -> dict[str, Any]:
    if not layout.recipe.is_file():
        raise StorageError(f"{layout.out} is no run of fusekit: it has no {layout.recipe.name}")
    recipe = _mapping(layout.recipe)
    sources = recipe.get("sources")
    if not isinstance(recipe.get("pivot"), dict) or not isinstance(sources, list):
        raise StorageError(f"{layout.recipe} is damaged: it has no pivot, or no sources")
    if not all(isinstance(entry, dict) and source_name(entry) for entry in sources):
        raise StorageError(f"{layout.recipe} is damaged: a source has no model")
    if unsafe := [name for name in map(source_name, sources) if name in (".", "..") or "/" in name or "\0" in name]:
        raise StorageError(f"{layout.recipe} is damaged: a source is called {unsafe[0]!r}, which is no folder's name")
    return recipe


def _mapping(path: Path) -> dict[str, Any]:
    data = safe_yaml.load(path).data
    if not isinstance(data, dict):
        raise StorageError(f"{path} is damaged: it is no mapping")
    return data


def _captures(path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise StorageError(f"{path} is damaged: it is no mapping")
    return {str(name): dict(made) for name, made in found.items() if isinstance(made, dict)}


def _place(target: str, sources: list[str]) -> tuple[int, str]:
    return (sources.index(target) if target in sources else len(sources), target)
