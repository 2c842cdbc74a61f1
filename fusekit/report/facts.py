"""What the report knows of a run: what its folder holds for the recipe, what is missing, and what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fusekit import artifacts as artifact
from fusekit import yaml as safe_yaml
from fusekit.alignment.quality import Sample, read_samples
from fusekit.artifacts import Artifact, weights_hash
from fusekit.capturing.store import Store
from fusekit.disk import commit_file
from fusekit.distillation.outputs import targets_of
from fusekit.errors import FusekitError, StorageError
from fusekit.layout import BASELINE, MERGED, PIVOT, Layout
from fusekit.recipe import Recipe
from fusekit.recipe.sections import last_part
from fusekit.report import text

if TYPE_CHECKING:
    from fusekit.capturing.models import Checkpoint

BASELINE_PLACE = "baselines/sft"
HUB = "https://huggingface.co/"
_FORMS = ("byte-level", "metaspace", "WordPiece", "plain")  # by fusekit.alignment.surfaces.Form

Loaded = TypeVar("Loaded")


class _Record(BaseModel):
    """What the report needs of a JSON file; other keys are ignored, and a wrong type is a damaged file."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Tokenizer(_Record):
    """A tokenizer in words. form: how its tokens write text. byte_fallback: whether it has a token for every byte."""

    model: str
    form: str
    tokens: int
    byte_fallback: bool = False
    normalises: list[str] = []

    def __str__(self) -> str:
        normalises = f"; normalises ({', '.join(self.normalises)})" if self.normalises else ""
        return f"{self.model}, {self.form}{', byte fallback' * self.byte_fallback}; {self.tokens:,} tokens{normalises}"


class ModelFacts(_Record):
    """The pivot or a source, as a run describes it in ``models.json`` while it has the model.

    model: as in the recipe. repository, commit: on the hub. parameters: None where the weights were not on disk.
    dtype: of the weights on disk, or the format of a GGUF file.
    """

    model: str
    repository: str | None = None
    commit: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    layers: int | None = None
    width: int | None = None
    vocabulary: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    tokenizer: Tokenizer | None = None

    @property
    def kind(self) -> str:
        """The architecture, shortened."""
        return (self.architecture or "").removesuffix("ForCausalLM")

    @property
    def shown(self) -> str:
        """The name on the hub; the path of a folder or a GGUF file."""
        return self.repository if self.repository and not self.model.endswith(".gguf") else self.model

    @property
    def url(self) -> str | None:
        """Its page on the hub."""
        return f"{HUB}{self.repository}" if self.repository else None


class Counts(_Record):
    """``data/counts.json`` (:class:`fusekit.data.reading.DataCounts`)."""

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


class CaseWorth(_Record):
    """Labels of one case: how many, and nats per label of the teacher and of the pivot."""

    labels: int
    teacher: float | None = None
    pivot: float | None = None
    worse: bool = False


class Worth(_Record):
    """``alignment/SOURCE/worth.json`` (:class:`fusekit.distillation.worth.TeacherWorth`)."""

    vocabulary: str
    tokens: str
    tail: str
    examples: int
    cases: dict[str, CaseWorth]
    summary: str
    warnings: list[str]


class Training(_Record):
    """``training.json`` of a distilled model (:mod:`fusekit.distillation.run`)."""

    target: str
    sources: list[str] = []
    settings: dict[str, Any] = {}
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


class Results(_Record):
    """``results.json``: model -> metric -> skill -> value; what each task of lm-eval measures."""

    models: dict[str, dict[str, dict[str, float | None]]]
    lm_eval: dict[str, dict[str, Any]] = {}


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


class Facts:
    """A run, finished or not. Nothing large is read: models are told apart by the hashes in their manifests.

    Attributes:
        layout, recipe, sources: where it is, every value of its recipe, and the sources' names in its order.
        models, stores, captures: of the pivot and the sources: what ``models.json`` says, stores, also unfinished ones,
            and how long the captures took.
        counts, judged: what became of the examples, and the votes on the models' own answers.
        qualities, samples, worths: alignments by source.
        targets, baseline: training records of the recipe's distilled models, by name, and of plain fine-tuning.
        training: names of distilled models whose training has begun but is not finished.
        merged, merge_recipe, coefficients: manifest, mergekit's recipe, and what was taken of which model; None where
            the merged model is not the recipe's.
        results: scores of the models that are there now.
        artifacts: manifests by place in the folder.
        left_out: what belongs to an earlier recipe and is not shown, a sentence each.
        problems: what cannot be read and is left out, a line each.

    Raises StorageError: ``out`` is not the output of a run, or its recipe is damaged.
    """

    def __init__(self, out: Path) -> None:
        self.layout = layout = Layout(out.resolve())
        self.left_out: list[str] = []
        self.problems: list[str] = []
        self.recipe = _recipe(layout)
        self.sources = [source_name(entry) for entry in self.recipe["sources"]]
        names = [PIVOT, *self.sources]
        self._wanted = _target_names(self.recipe, layout)
        targets = self._each(self._wanted, lambda name: self._record(layout.targets / name / "training.json", Training))
        order = {name: at for at, name in enumerate(self.sources)}
        self.targets = {name: targets[name] for name in sorted(targets, key=lambda n: (order.get(n, len(order)), n))}
        begun = sorted(path.name.removesuffix(".training") for path in layout.targets.glob("*.training"))
        self.training = [name for name in begun if name not in targets and not name.startswith(".")]
        self.baseline = self._record(layout.out / BASELINE_PLACE / "training.json", Training)
        self.artifacts = self._manifests()
        self.merged = self._merged()
        merge_recipe = self._tried(layout.merge_recipe, _mapping)
        self.merge_recipe = merge_recipe if self.merged else None
        self.coefficients = self._record(layout.merged / "coefficients.json", Coefficients) if self.merged else None
        self.models = self._record(layout.models, dict[str, ModelFacts]) or {}
        self.counts = self._record(layout.data / "counts.json", Counts)
        self.judged = self._record(layout.judged / "counts.json", Judged) if self.recipe.get("respond") else None
        self.stores = self._each(
            names, lambda name: self._tried(layout.store(name), lambda path: Store.open(path, incomplete=True))
        )
        times = self._record(layout.times, dict[str, Any]) or {}
        self.captures = {name: made for name, made in times.items() if isinstance(made, dict)}
        self.qualities = self._each(
            self.sources, lambda name: self._record(layout.alignment(name) / "quality.json", Quality)
        )
        self.samples: dict[str, list[Sample]] = self._each(
            self.sources, lambda name: self._tried(layout.alignment(name) / "samples.json", read_samples)
        )
        self.worths = self._each(self.sources, lambda name: self._record(layout.worth(name), Worth))
        self.results = self._results()

    def value(self, path: str) -> Any:
        """A value of the recipe, as ``fusion.mode``; None where there is none."""
        found: Any = self.recipe
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the recipe says of the pivot and of each source."""
        return {PIVOT: self.recipe["pivot"]} | dict(zip(self.sources, self.recipe["sources"], strict=True))

    def model_name(self, name: str) -> str:
        """What the recipe calls the model of the pivot or a source."""
        return model_path(self.entries[name])

    @property
    def trained(self) -> dict[str, Training]:
        """Training records of distilled models and baseline, by their place in the folder."""
        found = {f"targets/{name}": record for name, record in self.targets.items()}
        return found | ({BASELINE_PLACE: self.baseline} if self.baseline is not None else {})

    @property
    def merged_from(self) -> dict[str, str]:
        """The distilled models that the merged one was made from, and the hashes of their weights."""
        return _merged_from(self.merged) if self.merged is not None else {}

    def _merged(self) -> Artifact | None:
        """The manifest of the merged model if it is the recipe's; else it counts as absent."""
        merged = self.artifacts.get(MERGED)
        if merged is None:
            return None
        used, targets = _merged_from(merged), self._wanted
        # A model that is gone counts as unchanged.
        changed = [name for name in targets if self._weights(f"targets/{name}") not in (None, used.get(name))]
        if self.recipe.get("merge") is None:
            why = "the recipe has no merge"
        elif set(used) != set(targets):
            made_from, wanted = text.listed(sorted(used)) or "unknown models", text.listed(sorted(targets))
            why = f"it was merged from {made_from}, but the recipe's distilled models are {wanted}"
        elif changed:
            why = f"distilled models changed after the merge ({text.listed(changed)})"
        else:
            return merged
        self.left_out.append(f"The merged model in merged/ is left out, and its card is not changed: {why}.")
        del self.artifacts[MERGED]
        return None

    def _results(self) -> Results | None:
        """The scores of the models that are there now; those of others are left out."""
        found = self._record(self.layout.results, Results)
        if found is None:
            return None
        if self.recipe.get("evaluate") is None:
            self.left_out.append("The scores in results.json are left out: the recipe has no evaluation.")
            return None
        reasons: dict[str, list[str]] = {}
        kept = {}
        for name, scores in found.models.items():
            if why := self._why_not_scored(name, scores):
                reasons.setdefault(why, []).append(name)
                self.artifacts.pop(f"evaluation/{name}", None)
            else:
                kept[name] = scores
        self.left_out += [f"The scores of {text.listed(who)} are left out: {why}." for why, who in reasons.items()]
        return found.model_copy(update={"models": kept})

    def _why_not_scored(self, name: str, scores: Mapping[str, Any]) -> str | None:
        """Why scores in ``results.json`` are not those of the model that is there now; None where they are."""
        given = [PIVOT, *(f"sources/{source}" for source in self.sources)]
        made = [f"targets/{target}" for target in self.targets]
        made += [place for place, known in ((BASELINE, self.baseline), (MERGED, self.merged)) if known is not None]
        merged = {f"targets/{target}": weights for target, weights in self.merged_from.items()}  # it may be gone
        if name not in (*given, *made, *merged):
            return "the recipe has no such model, or it is missing"
        if name not in given:
            known = self.artifacts.get(f"evaluation/{name}")
            now = self._weights(BASELINE_PLACE if name == BASELINE else name) or merged.get(name)
            if now != (known.inputs.get("model") if known is not None else None):
                return "they were measured on an earlier model"
        own = self._record(self.layout.evaluation(name) / "scores.json", dict[str, dict[str, float | None]])
        if own is not None and json.dumps(own) != json.dumps({m: v for m, v in scores.items() if m != "lm_eval"}):
            return "there are newer ones, which results.json does not have yet"
        return None

    def _weights(self, place: str) -> str | None:
        """Hash of a model's weights; None where there is no manifest, or a damaged one."""
        try:
            return weights_hash(self.layout.out / place)
        except StorageError:
            return None

    def _manifests(self) -> dict[str, Artifact]:
        """Manifests in the order of the stages; of alignments and distilled models those of the recipe."""
        layout = self.layout
        folders = [layout.data, *(layout.responses(name) for name in [PIVOT, *self.sources]), layout.judged]
        folders += [layout.alignment(name) for name in sorted(self.sources)]
        folders += [layout.targets / name for name in sorted(self._wanted)]
        folders += [*sorted(layout.baselines.glob("*")), layout.merged]
        folders += sorted(path.parent for path in layout.evaluation("x").parent.rglob(artifact.MANIFEST))
        found = {}
        for folder in folders:
            if folder.name.startswith("."):
                continue
            known = self._tried(folder / artifact.MANIFEST, lambda file: artifact.read(file.parent))
            if known is not None:
                found[folder.relative_to(layout.out).as_posix()] = known
        return found

    def _tried(self, path: Path, load: Callable[[Path], Loaded]) -> Loaded | None:
        """``load(path)``; None where the path does not exist, or is damaged, which becomes a problem."""
        if not path.exists():
            return None
        try:
            return load(path)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (FusekitError, OSError, ValueError, RecursionError) as error:
            why = str(error)
        place = path.relative_to(self.layout.out)
        said = why.splitlines()[0].replace(f"{self.layout.out}/", "")
        self.problems.append(f"{place}: {said.removeprefix(f'{place}: ')}")
        return None

    def _record(self, path: Path, kind: type[Loaded]) -> Loaded | None:
        return self._tried(path, lambda file: TypeAdapter(kind).validate_python(json.loads(file.read_bytes())))

    @staticmethod
    def _each(names: list[str], load: Callable[[str], Loaded | None]) -> dict[str, Loaded]:
        return {name: value for name in names if (value := load(name))}


def _merged_from(merged: Artifact) -> dict[str, str]:
    used = merged.inputs.get("targets")
    return {str(name): str(known) for name, known in used.items()} if isinstance(used, dict) else {}


def source_name(entry: Mapping[str, Any]) -> str:
    """What a run calls a source (:attr:`fusekit.recipe.sections.Source.label`)."""
    return str(entry.get("name") or last_part(model_path(entry)))


def model_path(entry: Mapping[str, Any]) -> str:
    """The model of the pivot or a source (:attr:`fusekit.recipe.sections.Pivot.path`)."""
    model, file = str(entry.get("model", "")), entry.get("gguf_file")
    return f"{model.rstrip('/')}/{file}" if file else model


def _target_names(recipe: Mapping[str, Any], layout: Layout) -> list[str]:
    """The distilled models that a recipe asks for; all that exist where this version cannot read the recipe."""
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


def facts_of(checkpoint: Checkpoint, tokenizer: Any) -> ModelFacts:
    """Read a model's configuration, the headers of its weights where they are on disk, and its tokenizer."""
    config: dict[str, Any] = checkpoint.config
    inner = config.get("text_config")
    layered = [config, inner if isinstance(inner, dict) else {}]

    def number(*names: str) -> int | None:
        found = (part.get(name) for part in layered for name in names)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

    gguf, classes = checkpoint.gguf, config.get("architectures")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        model=checkpoint.choice.model,
        repository=checkpoint.repository,
        commit=checkpoint.commit,
        architecture=str(classes[0]) if isinstance(classes, list) and classes else None,
        model_type=str(config["model_type"]) if "model_type" in config else None,
        layers=number("num_hidden_layers", "n_layer"),
        width=number("hidden_size", "n_embd"),
        vocabulary=number("vocab_size"),
        parameters=gguf.parameters if gguf else _elements(checkpoint),
        dtype=f"GGUF {gguf.format}" if gguf else str(dtype) if dtype else None,
        tokenizer=_described(tokenizer),
    )


def _elements(checkpoint: Checkpoint) -> int | None:
    """Elements of all tensors; None where its safetensors files are not on disk, or cannot be read."""
    try:
        headers = checkpoint.headers()
    except FusekitError:
        return None
    return None if headers is None else sum(tensor.elements for tensor in headers.values())


def _described(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer in words; None where its vocabulary cannot be read."""
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.surfaces import Kind

    try:
        surfaces = vocabulary_surfaces(tokenizer)
    except FusekitError:
        return None
    return Tokenizer(
        model=type(surfaces.view.backend.model).__name__,
        form=_FORMS[surfaces.form],
        tokens=int((surfaces.kinds != Kind.HOLE).sum()),
        byte_fallback=bool((surfaces.kinds == Kind.BYTE).any()),
        normalises=sorted(surfaces.view.types("normalizer") - {"Sequence", "Prepend", "Replace"}),
    )


def write_models(path: Path, facts: Mapping[str, ModelFacts]) -> None:
    """Write ``models.json`` if its content changes."""
    plain = {name: found.model_dump(mode="json", exclude_defaults=True) for name, found in facts.items()}
    data = (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        commit_file(path, data)
