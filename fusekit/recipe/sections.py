"""The sections of a fusion recipe. An unknown key or a value out of range cannot load.

Every default here is the default of the preset ``fusekit``; presets.py has the papers' values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fusekit.distillation.settings import AlignmentSettings, DistillSettings, FusionSettings, TrainingSettings
from fusekit.evaluation.settings import LmEval
from fusekit.storage.codec import DEFAULT_MAX_ERROR

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


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


class Pivot(Section):
    """The model whose architecture and tokenizer the result has."""

    model: str = Field(description="A folder, or a name on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    chat_template: str = Field(default="own", description="`own`, the name of a shipped template, or a jinja file.")
    load: Load = Load()
    trust_remote_code: bool = Field(default=False, description="Run the Python code that comes with this model.")
    allow_pickle: bool = Field(default=False, description="Read pickled weights of this model.")


class SourceAlignment(Section):
    """What differs for one source from the section ``alignment``."""

    tokens: Literal["span", "dtw"] | None = None
    vocabulary: Literal["em", "mined", "ms", "ms_released", "prefix"] | None = None
    conditioning: bool | None = None
    one_hot: bool | None = None
    collisions: Literal["add", "max"] | None = None


class Source(Pivot):
    """A model that knows something."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(
        default=None, description="What folders and reports call it; null: the last part of `model`."
    )
    chat_template: str = Field(
        default="own", description="`own`, `pivot` (the papers'), the name of a shipped template, or a jinja file."
    )
    alignment: SourceAlignment = SourceAlignment()

    @property
    def label(self) -> str:
        """What folders and reports call the source."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


class Data(Section):
    """The rows that all models read."""

    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Files (.json, .jsonl, .parquet, .txt) or hub ids: messages, ShareGPT, instruction triples, text."
    )
    name: str | None = Field(default=None, description="Configuration of a data set on the hub.")
    split: str = Field(default="train", description="Split of a data set on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    streaming: bool = Field(default=False, description="Read a data set on the hub without downloading all of it.")
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Most rows to read; null: all.")
    max_length: Annotated[int, Field(ge=2)] = Field(default=2048, description="Most tokens of a row, for every model.")
    overlong: Literal["cut", "drop"] = Field(default="cut", description="What happens to longer rows.")
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="Which tokens are learnt.")
    pack: bool = Field(default=False, description="Pack plain text into blocks of max_length tokens.")


class Represent(Section):
    """What is kept of each model's distributions."""

    top_k: Annotated[int, Field(gt=0)] = Field(default=10, description="Most entries per position.")
    keep_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Fewer entries once they hold this probability."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Of the distributions that are kept.")
    batch_tokens: Annotated[int, Field(gt=0)] = Field(default=16384, description="Tokens of a batch, padding included.")
    max_error: Annotated[float, Field(ge=0, le=1)] = Field(
        default=DEFAULT_MAX_ERROR,
        description="Largest error of a stored log-probability, nats; 0: float32.",
    )
    rows_per_shard: Annotated[int, Field(gt=0)] = Field(
        default=1024, description="Rows that are captured anew at most when a run is interrupted."
    )
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="Share of the rows that may have NaN or infinite logits."
    )


class Evaluate(Section):
    """Held-out rows."""

    path: str | Annotated[list[str], Field(min_length=1)]
    metrics: list[Literal["bits_per_byte", "exact_match"]] = ["bits_per_byte"]
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Most rows of each file; null: all.")
    baseline: bool = Field(default=True, description="Also train and evaluate plain fine-tuning on the same rows.")
    batch_tokens: Annotated[int, Field(gt=0)] = Field(default=16384, description="Tokens of a batch, padding included.")
    lm_eval: LmEval | None = Field(
        default=None, description="Tasks of lm-eval, `[hellaswag, gsm8k]` (pip install 'fusekit[lm-eval]')."
    )


class Recipe(Section):
    """A fusion recipe: sources, data, and what happens to them on the way to one model."""

    preset: str = Field(default="fusekit", description="A named set of values.")
    seed: int = 0
    pivot: Pivot
    sources: Annotated[list[Source], Field(min_length=1)]
    data: Data
    represent: Represent = Represent()
    alignment: AlignmentSettings = AlignmentSettings()
    fusion: FusionSettings = FusionSettings()
    distill: TrainingSettings = TrainingSettings()
    merge: dict[str, Any] | None = Field(
        default=None, description="mergekit's own syntax; models and base_model are filled in."
    )
    evaluate: Evaluate | None = None

    @field_validator("fusion")
    @classmethod
    def _no_rewards(cls, fusion: FusionSettings) -> FusionSettings:
        if fusion.function == "reward_softmax":
            raise ValueError(
                "function reward_softmax needs a reward per row and model, which no recipe can name: use it from "
                "Python (FusionDataset(rewards=...)), or choose min_ce or avg_ce"
            )
        return fusion

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}: give one a `name` of its own")
        if "pivot" in labels:
            raise ValueError("no source may be called 'pivot': give it another `name`")
        return self

    @property
    def settings(self) -> DistillSettings:
        """The sections ``alignment``, ``fusion`` and ``distill`` as the trainer takes them."""
        return DistillSettings(preset=self.preset, alignment=self.alignment, fusion=self.fusion, training=self.distill)

    def alignment_of(self, source: Source) -> AlignmentSettings:
        """The section ``alignment`` with what differs for a source."""
        return self.alignment.model_copy(update=source.alignment.model_dump(exclude_none=True))
