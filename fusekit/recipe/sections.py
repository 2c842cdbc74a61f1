"""The sections of a fusion recipe; every default is that of the preset ``fusekit``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fusekit.distillation.settings import (
    AlignmentSettings,
    DistillSettings,
    FusionSettings,
    TrainingSettings,
    clashes,
    targets_of,
)
from fusekit.gguf import SUFFIX
from fusekit.layout import PIVOT, TRAINING, WORK
from fusekit.settings import (
    PATH,
    CaptureSettings,
    DataSettings,
    EngineSettings,
    EvaluateSettings,
    Positive,
    RespondSettings,
    Settings,
)
from fusekit.yaml import KeyPath, Mistake

_LONGEST_NAME = 100
_OTHER_FOLDERS = (PIVOT, "joint", "sft")  # what a run calls its other stores and models
UNREAD = "?"
"""What stands for the name of a model or of data that could not be read, as if it were on the hub."""


class Load(Settings):
    """How transformers loads a model; passed through to ``from_pretrained``."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the weights; auto: as the checkpoint says."
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="`auto` spreads a model over the GPUs that are there; null: one device."
    )
    quantization: dict[str, Any] | None = Field(
        default=None, description="Fields of transformers' quantization config, with `quant_method`."
    )
    attn_implementation: str | None = Field(
        default=None, description="`sdpa`, `flash_attention_2`, ...; null: transformers'."
    )


class ModelSize(Settings):
    """How large a model is: for ``fusekit plan`` where neither the disk nor the hub can be asked, and nothing else.

    The names are those of a config.json.
    """

    parameters: Positive = Field(description="Number of parameters.")
    active_parameters: Positive | None = Field(
        default=None, description="Number that takes part in one token, of a mixture of experts; null: all."
    )
    vocab_size: Positive | None = Field(default=None, description="Rows of the embedding.")
    hidden_size: Positive | None = Field(default=None, description="Width of the hidden states.")
    intermediate_size: Positive | None = Field(default=None, description="Width of the feed-forward.")
    num_hidden_layers: Positive | None = Field(default=None, description="How many layers.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Of the files.")


class DataSize(Settings):
    """How large the data are, for ``fusekit plan`` where they cannot be read."""

    rows: Positive = Field(description="Number of examples.")
    tokens: Positive | None = Field(default=None, description="Tokens of all, for the pivot.")
    labels: Positive | None = Field(default=None, description="Labels among them; null: all.")


class Pivot(Settings):
    """The model whose architecture and tokenizer the result has."""

    model: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        description="A folder, or a name on the Hugging Face hub; or the path of a GGUF file."
    )
    gguf_file: str | None = Field(
        default=None, description="Name of a GGUF file in `model`, as for transformers: the weights are dequantised."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    chat_template: str = Field(default="own", description="`own`, the name of a shipped template, or a jinja file.")
    load: Load = Field(default=Load(), description="How transformers loads the model.")
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the model when it is captured.")
    trust_remote_code: bool = Field(default=False, description="Run the Python code that comes with this model.")
    allow_pickle: bool = Field(default=False, description="Read pickled weights of this model.")
    size: ModelSize | None = Field(default=None, description="For `fusekit plan` where the model is not at hand.")

    @property
    def path(self) -> str:
        """The model, or the GGUF file in it."""
        return self.model if self.gguf_file is None else f"{self.model.rstrip('/')}/{self.gguf_file}"


def _as_recipe(key: str) -> Any:
    return Field(default=None, description=f"As `alignment.{key}`, for this source; null: the recipe's.")


class SourceAlignment(Settings):
    """What differs for one source from the section ``alignment``."""

    tokens: Literal["span", "dtw"] | None = _as_recipe("tokens")
    vocabulary: Literal["em", "mined", "ms", "ms_released", "prefix"] | None = _as_recipe("vocabulary")
    conditioning: bool | None = _as_recipe("conditioning")
    tail: Literal["back_off", "pivot_share", "listed_share", "drop", "keep"] | None = _as_recipe("tail")
    one_hot: bool | None = _as_recipe("one_hot")
    collisions: Literal["add", "max"] | None = _as_recipe("collisions")


class Source(Pivot):
    """A model that knows something."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        default=None, description="What folders and reports call it; null: the last part of `model` or `gguf_file`."
    )
    chat_template: str = Field(
        default="own", description="`own`, `pivot` (the papers'), the name of a shipped template, or a jinja file."
    )
    on_the_fly: bool = Field(
        default=False,
        description="Score this source while training reads, without a store: for more examples than a disk holds. It "
        "stays loaded while its model is distilled, and is scored again in every epoch.",
    )
    alignment: SourceAlignment = Field(
        default=SourceAlignment(), description="What differs for this source from the section `alignment`."
    )

    @property
    def label(self) -> str:
        """What folders and reports call the source."""
        return self.name or last_part(self.path)


def last_part(path: str) -> str:
    """What a model is called where its place does not matter."""
    return path.rstrip("/").rsplit("/", 1)[-1].removesuffix(SUFFIX)


class Data(DataSettings):
    """The examples that all models read."""

    size: DataSize | None = Field(default=None, description="For `fusekit plan` where the data are not at hand.")

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Evaluate(EvaluateSettings):
    """Held-out examples."""

    path: str | Annotated[list[str], Field(min_length=1)] = Field(description=PATH)
    baseline: bool = Field(default=True, description="Also train and evaluate plain fine-tuning on the same examples.")


class Recipe(Settings):
    """A fusion recipe: sources, data, and what happens to them on the way to one model."""

    preset: str = Field(default="fusekit", description="A named set of values, below the recipe's own.")
    seed: int = Field(
        default=0, ge=0, lt=1 << 32, description="Random seed of merge methods that draw; training has `distill.seed`."
    )
    pivot: Pivot = Field(description="The model that is trained; the result has its architecture and tokenizer.")
    sources: Annotated[list[Source], Field(min_length=1)] = Field(description="The models that the pivot learns from.")
    data: Data = Field(description="The examples that all models read.")
    capture: CaptureSettings = Field(default=CaptureSettings(), description="What is kept of a model's distributions.")
    alignment: AlignmentSettings = Field(
        default=AlignmentSettings(), description="How sources' rows come into the pivot's tokens and vocabulary."
    )
    respond: RespondSettings | None = Field(
        default=None, description="Answers of all models to the questions of the data, for a `schedule` (ProFuser)."
    )
    fusion: FusionSettings = Field(
        default=FusionSettings(), description="What becomes of several models' rows at one label."
    )
    distill: TrainingSettings = Field(default=TrainingSettings(), description="The loss and the training.")
    merge: dict[str, Any] | None = Field(
        default=None, description="mergekit's own syntax; models and base_model are filled in."
    )
    evaluate: Evaluate | None = Field(default=None, description="Held-out examples to score every model on.")

    def clashes(self) -> Iterator[Mistake]:
        """Values, each right by itself, that do not go together, and names that clash."""
        labels = [source.label for source in self.sources]
        for index, (source, label) in enumerate(zip(self.sources, labels, strict=True)):
            if label in labels[:index]:
                yield Mistake(f"two sources are called {label!r}: give one a `name` of its own", ("sources", index))
            if label in _OTHER_FOLDERS or label.endswith((TRAINING, WORK)) or not label or label.startswith("."):
                why = "which cannot be a folder of its own in the output: give it another `name`"
                yield Mistake(f"no source may be called {label!r}, {why}", ("sources", index))
            if len(label) > _LONGEST_NAME:
                says = f"the source {label[:20]}... has a name of {len(label)} characters: give it a `name` of at most"
                yield Mistake(f"{says} {_LONGEST_NAME}", ("sources", index))
            if (source.path, source.revision) == (self.pivot.path, self.pivot.revision):
                says = f"the source {label!r} is the pivot itself, which it has nothing to teach: remove it"
                yield Mistake(says, ("sources", index))
        if (self.respond is None) != (self.distill.schedule is None):
            has, lacks = ("distill.schedule", "respond") if self.respond is None else ("respond", "distill.schedule")
            says = f"{has} is given, but not {lacks}: a schedule trains on answers, which nothing else reads"
            yield Mistake(says, ("respond",), ("distill", "schedule"))
        sections: list[tuple[KeyPath, AlignmentSettings]] = [(("alignment",), self.alignment)]
        for index, source in enumerate(self.sources):
            sections.append((("sources", index, "alignment"), self.alignment_of(source)))
            if source.on_the_fly and self.distill.schedule is not None:
                says = f"a schedule reads stores, but {source.label} is scored on the fly: leave out either of them"
                yield Mistake(says, ("sources", index, "on_the_fly"), ("distill", "schedule"))
        said: set[str] = set()
        for at, alignment in sections:
            places: dict[str | int, KeyPath] = {"training": ("distill",), "alignment": at, "fusion": ("fusion",)}
            for clash in clashes(alignment, self.fusion, self.distill, len(self.sources)):
                if clash.says not in said:
                    yield Mistake(clash.says, *((*places[section], *key) for section, *key in clash.paths))
                said.add(clash.says)

    @property
    def models(self) -> dict[str, Pivot]:
        """The pivot by the name ``pivot``, then the sources by theirs, in order."""
        return {PIVOT: self.pivot} | {source.label: source for source in self.sources}

    @property
    def settings(self) -> DistillSettings:
        """The sections ``alignment``, ``fusion`` and ``distill`` as the trainer takes them."""
        return DistillSettings(preset=self.preset, alignment=self.alignment, fusion=self.fusion, training=self.distill)

    @property
    def targets(self) -> list[str]:
        """Names of the models that are trained: one per source, or one from all."""
        return [target.name for target in targets_of(self.settings, [source.label for source in self.sources], Path())]

    @property
    def wants_baseline(self) -> bool:
        """Whether plain fine-tuning is trained beside the distilled models, unless it is the one that is asked for."""
        return self.evaluate is not None and self.evaluate.baseline and not self.settings.plain

    def alignment_of(self, source: Source) -> AlignmentSettings:
        """The section ``alignment`` with what differs for a source."""
        return self.alignment.model_copy(update=source.alignment.model_dump(exclude_none=True))
