"""The sections of a fusion recipe. An unknown key or a value out of range cannot load.

Every default here is the default of the preset ``fusekit``; presets.py has the papers' values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
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
    trust_remote_code: bool = Field(
        default=False, description="Run the code that comes with this model. Off for good reasons."
    )


class SourceAlignment(Section):
    """What differs for one source from the section ``alignment``."""

    tokens: Literal["span", "dtw"] | None = None
    vocabulary: Literal["em", "mined", "ms", "prefix"] | None = None


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


class Represent(Section):
    """What is kept of each model's distributions."""

    top_k: Annotated[int, Field(gt=0)] = Field(default=10, description="Most entries per position.")
    keep_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Fewer entries once they hold this probability."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Of the distributions that are kept.")
    batch_tokens: Annotated[int, Field(gt=0)] = Field(default=16384, description="Tokens of a batch, padding included.")
    max_error: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.125, description="Largest error of a small stored log-probability in nats; 0: exact, in float32."
    )


class Alignment(Section):
    """How a source's rows come to the pivot's positions and vocabulary."""

    tokens: Literal["span", "dtw"] = Field(default="span", description="span: exact; dtw: the papers'.")
    vocabulary: Literal["em", "mined", "ms", "prefix"] = Field(
        default="prefix", description="How tokens map to the pivot's."
    )
    conditioning: bool = Field(default=True, description="Teach positions inside a source token too.")
    one_hot: bool = Field(default=False, description="A one-hot on the label where there is no row, as the papers do.")


class Fusion(Section):
    """Which distributions are taught, and to how many targets."""

    mode: Literal["pairwise", "joint"] = Field(default="pairwise", description="One target per source, or one for all.")
    function: str = Field(default="min_ce", description="min_ce, avg_ce or another fusion function by name.")
    level: Literal["sequence", "token"] = Field(default="sequence", description="One choice per row, or per position.")
    metric: Literal["token_ce", "bits_per_byte"] = Field(
        default="bits_per_byte", description="What sources are compared by; token_ce is the papers'."
    )
    include_pivot: bool = Field(default=True, description="Whether the pivot's own distribution is a candidate.")


class Distill(Section):
    """How a target is trained."""

    lm_weight: Fraction = Field(default=0.9, description="λ of the papers: weight of the labels' cross-entropy.")
    loss: Literal["ce", "kl", "reverse_kl", "js", "uld_topk"] = Field(
        default="kl", description="Against the fused rows."
    )
    truncation: Literal["renormalize", "tail"] = Field(
        default="tail", description="What the mass outside the kept entries becomes; renormalize is the papers'."
    )
    epochs: Annotated[float, Field(gt=0)] = 3
    learning_rate: Annotated[float, Field(gt=0)] = 5.0e-6
    batch_size: Annotated[int, Field(gt=0)] = Field(
        default=128, description="Rows of an optimizer step, over all processes."
    )
    lora: dict[str, Any] | None = Field(
        default=None, description="Fields of peft's LoraConfig; null: full fine-tuning."
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers.TrainingArguments.")


class Evaluate(Section):
    """Held-out rows."""

    path: str | Annotated[list[str], Field(min_length=1)]
    metrics: list[Literal["bits_per_byte", "exact_match"]] = ["bits_per_byte"]


class Recipe(Section):
    """A fusion recipe: sources, data, and what happens to them on the way to one model."""

    preset: Literal["fusekit", "fusechat", "fusellm"] = Field(default="fusekit", description="A named set of values.")
    seed: int = 0
    pivot: Pivot
    sources: Annotated[list[Source], Field(min_length=1)]
    data: Data
    represent: Represent = Represent()
    alignment: Alignment = Alignment()
    fusion: Fusion = Fusion()
    distill: Distill = Distill()
    merge: dict[str, Any] | None = Field(
        default=None, description="mergekit's own syntax; models and base_model are filled in."
    )
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}: give one a `name` of its own")
        if "pivot" in labels:
            raise ValueError("no source may be called 'pivot': give it another `name`")
        return self
