"""The sections of a fusion recipe. An unknown key or a value out of range cannot load.

Every default here is the default of the preset ``fusekit``; presets.py has the papers' values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from fusekit.capturing.settings import CaptureSettings
from fusekit.data.settings import DataSettings
from fusekit.distillation.settings import (
    AlignmentSettings,
    DistillSettings,
    FusionSettings,
    TrainingSettings,
    clashes,
)
from fusekit.evaluation.settings import PATH, EvaluateSettings
from fusekit.gguf import SUFFIX
from fusekit.yaml import KeyPath

_AS_RECIPE = "As `alignment.{}`, for this source; null: the recipe's."
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_OTHER_FOLDERS = ("pivot", "joint", "sft")
"""What a run calls its other stores and targets."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values cannot be changed once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Load(Section):
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


class ModelSize(Section):
    """How large a model is: for ``fusekit plan`` where neither the disk nor the hub can be asked, and nothing else.

    The names are those of a config.json.
    """

    parameters: Annotated[int, Field(gt=0)] = Field(description="Number of parameters.")
    active_parameters: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Number that takes part in one token, of a mixture of experts; null: all."
    )
    vocab_size: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Rows of the embedding.")
    hidden_size: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Width of the hidden states.")
    intermediate_size: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Width of the feed-forward."
    )
    num_hidden_layers: Annotated[int, Field(gt=0)] | None = Field(default=None, description="How many layers.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Of the files.")


class DataSize(Section):
    """How large the data are, for ``fusekit plan`` where they cannot be read."""

    rows: Annotated[int, Field(gt=0)] = Field(description="Number of examples.")
    tokens: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Tokens of all, for the pivot.")
    labels: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Labels among them; null: all.")


class Pivot(Section):
    """The model whose architecture and tokenizer the result has."""

    model: str = Field(description="A folder, or a name on the Hugging Face hub; or the path of a GGUF file.")
    gguf_file: str | None = Field(
        default=None, description="Name of a GGUF file in `model`, as for transformers: the weights are dequantised."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    chat_template: str = Field(default="own", description="`own`, the name of a shipped template, or a jinja file.")
    load: Load = Field(default=Load(), description="How transformers loads the model.")
    trust_remote_code: bool = Field(default=False, description="Run the Python code that comes with this model.")
    allow_pickle: bool = Field(default=False, description="Read pickled weights of this model.")
    size: ModelSize | None = Field(default=None, description="For `fusekit plan` where the model is not at hand.")

    @property
    def path(self) -> str:
        """The model, or the GGUF file in it."""
        return self.model if self.gguf_file is None else f"{self.model.rstrip('/')}/{self.gguf_file}"

    @model_validator(mode="after")
    def _gguf(self) -> Pivot:
        file = self.gguf_file
        if file is not None and (not file.endswith(SUFFIX) or file.startswith("/") or ".." in file.split("/")):
            raise ValueError(f"gguf_file is {file!r}: it is the name of a {SUFFIX} file in {self.model}")
        if file is not None and self.model.endswith(SUFFIX):
            raise ValueError(f"model is the GGUF file {self.model} already: leave out gguf_file ({file})")
        if self.path.endswith(SUFFIX) and self.load.quantization:
            raise ValueError(
                f"{self.path} is a GGUF file, which is dequantised when it is loaded: leave out load.quantization, or "
                "name the original model"
            )
        return self


class SourceAlignment(Section):
    """What differs for one source from the section ``alignment``."""

    tokens: Literal["span", "dtw"] | None = Field(default=None, description=_AS_RECIPE.format("tokens"))
    vocabulary: Literal["em", "mined", "ms", "ms_released", "prefix"] | None = Field(
        default=None, description=_AS_RECIPE.format("vocabulary")
    )
    conditioning: bool | None = Field(default=None, description=_AS_RECIPE.format("conditioning"))
    tail: Literal["back_off", "pivot_share", "listed_share", "drop", "keep"] | None = Field(
        default=None, description=_AS_RECIPE.format("tail")
    )
    one_hot: bool | None = Field(default=None, description=_AS_RECIPE.format("one_hot"))
    collisions: Literal["add", "max"] | None = Field(default=None, description=_AS_RECIPE.format("collisions"))


class Source(Pivot):
    """A model that knows something."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(
        default=None, description="What folders and reports call it; null: the last part of `model` or `gguf_file`."
    )
    chat_template: str = Field(
        default="own", description="`own`, `pivot` (the papers'), the name of a shipped template, or a jinja file."
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


class Evaluate(EvaluateSettings):
    """Held-out examples."""

    path: str | Annotated[list[str], Field(min_length=1)] = Field(description=PATH)
    baseline: bool = Field(default=True, description="Also train and evaluate plain fine-tuning on the same examples.")


@dataclass(frozen=True)
class Places:
    """Where the values of a recipe were written. Recipes that say the same are equal, wherever they say it."""

    by_path: Mapping[KeyPath, str] = field(default_factory=dict, compare=False)


class Recipe(Section):
    """A fusion recipe: sources, data, and what happens to them on the way to one model."""

    preset: str = Field(default="fusekit", description="A named set of values, below the recipe's own.")
    seed: int = Field(default=0, ge=0, description="Of merge methods that draw (dare); training has `distill.seed`.")
    pivot: Pivot = Field(description="The model that is trained; the result has its architecture and tokenizer.")
    sources: Annotated[list[Source], Field(min_length=1)] = Field(description="The models that the pivot learns from.")
    data: Data = Field(description="The examples that all models read.")
    capture: CaptureSettings = Field(default=CaptureSettings(), description="What is kept of a model's distributions.")
    alignment: AlignmentSettings = Field(
        default=AlignmentSettings(), description="How sources' rows come into the pivot's tokens and vocabulary."
    )
    fusion: FusionSettings = Field(
        default=FusionSettings(), description="What becomes of several models' rows at one label."
    )
    distill: TrainingSettings = Field(default=TrainingSettings(), description="The loss and the training.")
    merge: dict[str, Any] | None = Field(
        default=None, description="mergekit's own syntax; models and base_model are filled in."
    )
    evaluate: Evaluate | None = Field(default=None, description="Held-out examples to score every model on.")

    _places: Places = PrivateAttr(default_factory=Places)

    def place(self, *paths: KeyPath) -> str:
        """Where a value, or the nearest that encloses it, was written: a file and a line, or its path.

        paths: of the value; several where values clash, of which the recipe may have written only one.
        """
        for length in range(max(map(len, paths)), 0, -1):
            for path in paths:
                if len(path) >= length and path[:length] in self._places.by_path:
                    return self._places.by_path[path[:length]]
        return ".".join(map(str, paths[0]))

    @field_validator("fusion")
    @classmethod
    def _no_rewards(cls, fusion: FusionSettings) -> FusionSettings:
        if fusion.function == "reward_softmax":
            raise ValueError(
                "function reward_softmax needs a reward per example and model, which no recipe can name: use it from "
                "Python (FusionDataset(rewards=...)), or choose min_ce or avg_ce"
            )
        return fusion

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        found: list[tuple[str, list[KeyPath]]] = [(says, [("sources",)]) for says in self._wrong_names()]
        for clash in clashes(self.alignment, self.fusion, self.distill):
            values: list[KeyPath] = [({"training": "distill"}.get(name, name), key) for name, key in clash.values]
            found.append((clash.says, values))
        if found:
            raise ValidationError.from_exception_data("Recipe", [_mistake(says, paths, self) for says, paths in found])
        return self

    def _wrong_names(self) -> Iterator[str]:
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            yield f"two sources are called {twice[0]!r}: give one a `name` of its own"
        for label in labels:
            if label in _OTHER_FOLDERS or label.endswith(".training") or not label or label.startswith("."):
                yield (
                    f"no source may be called {label!r}, which cannot be a folder of its own in the output: give it "
                    "another `name`"
                )

    @property
    def settings(self) -> DistillSettings:
        """The sections ``alignment``, ``fusion`` and ``distill`` as the trainer takes them."""
        return DistillSettings(preset=self.preset, alignment=self.alignment, fusion=self.fusion, training=self.distill)

    @property
    def targets(self) -> list[str]:
        """Names of the models that are trained: one per source, or one from all."""
        from fusekit.distillation.outputs import targets_of

        return [target.name for target in targets_of(self.settings, [source.label for source in self.sources], Path())]

    @property
    def wants_baseline(self) -> bool:
        """Whether plain fine-tuning is trained beside the targets, to compare them with, unless it is the target."""
        return self.evaluate is not None and self.evaluate.baseline and not self.settings.plain

    def alignment_of(self, source: Source) -> AlignmentSettings:
        """The section ``alignment`` with what differs for a source."""
        return self.alignment.model_copy(update=source.alignment.model_dump(exclude_none=True))


def _mistake(says: str, paths: Sequence[KeyPath], recipe: Recipe) -> InitErrorDetails:
    """Of several values together. The context has the paths of all: the recipe may have written only one of them."""
    error = PydanticCustomError("clash", "{says}", {"says": says, "paths": paths})
    return InitErrorDetails(type=error, loc=paths[0], input=recipe)
