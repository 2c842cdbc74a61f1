"""The settings of data, captures, evaluation, generation, answers and judges, for recipes, commands and Python alike.

Each is declared here with its default and its help, and nowhere else. Those of a distillation are in
:mod:`fusekit.distillation.settings`, the models and sections that recipes alone have in :mod:`fusekit.recipe.sections`.
It imports neither torch nor transformers: recipes are loaded with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fusekit.errors import GenerationError
from fusekit.yaml import TRUTH, setting_problem

Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """A section of settings: unknown keys and truth values for numbers are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and not ("bool" in kinds or "Any" in kinds):
            raise ValueError(
                f"{str(value).lower()} is a truth value{TRUTH if 'str' in kinds or 'Literal' in kinds else ''}"
            )
        return value


class DataSettings(Settings):
    """Where examples come from, and how they are cut."""

    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Files (.json, .jsonl, .parquet, .txt) or hub ids: messages, ShareGPT, instruction triples, text."
    )
    name: str | None = Field(default=None, description="Configuration of a data set on the hub.")
    split: str = Field(default="train", description="Split of a data set on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    streaming: bool = Field(default=False, description="Read a data set on the hub without downloading all of it.")
    limit: Positive | None = Field(default=None, description="Most examples to read; null: all.")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="What happens at an unusable example; skipped ones are counted and listed."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(default=2048, description="Most tokens of an example.")
    overlong: Literal["cut", "drop"] = Field(default="cut", description="What happens to longer examples.")
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="Which tokens are labels.")
    pack: bool = Field(default=False, description="Pack plain text into blocks of max_length tokens.")


DEFAULT_MAX_ERROR = 0.2


@dataclass(frozen=True)
class Selection:
    """What is kept of a distribution.

    Attributes:
        k: at most so many entries.
        keep_mass: as many of them as reach this mass, at least one; 1 keeps all k.
        temperature: entries, remaining mass and the label's log-probability are of the softmax of logits divided by
            it. The negative log-likelihood is always of temperature 1.
    """

    k: int = 10
    keep_mass: float = 1.0
    temperature: float = 1.0


class CaptureSettings(Settings):
    """What is kept of a model's distributions, and how it is captured."""

    top_k: Positive = Field(default=10, description="Most entries per label.")
    keep_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Keep fewer entries once they hold this probability."
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Temperature of the distributions that are kept; the cross-entropy is always of temperature 1.",
    )
    head_dtype: Literal["float32", "model"] | None = Field(
        default=None,
        description="Compute the logits of a model in 16 bits in float32, or in the model's dtype, which rounds them; "
        "by default float32, unless the head is more than an eighth of the model.",
    )
    batch_tokens: Positive | None = Field(
        default=None, description="Most tokens of a batch, padding included; by default what suits the device."
    )
    max_error: Annotated[float, Field(ge=0, le=1)] = Field(
        default=DEFAULT_MAX_ERROR,
        description="Largest error of a stored log-probability in nats; 0 stores float32.",
    )
    rows_per_shard: Positive | None = Field(
        default=None,
        description="Most examples that an interruption may cost; by default about two minutes of work.",
    )
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="Share of the examples that may have NaN or infinite logits."
    )

    @property
    def selection(self) -> Selection:
        """What is kept of a distribution."""
        return Selection(self.top_k, self.keep_mass, self.temperature)

    def kept(self, vocabulary: int) -> dict[str, Any]:
        """The fields of a :class:`~fusekit.capturing.store.StoreSpec` that say what is kept, of so many ids."""
        return {
            "top_k": min(self.top_k, vocabulary),
            "keep_mass": self.keep_mass if self.keep_mass < 1 else None,
            "temperature": self.temperature,
            "max_error": self.max_error,
        }


Url = Annotated[str, Field(pattern=r"^https?://[^/\s]+")]


class EngineSettings(Settings):
    """What runs a model's forward passes when it is captured."""

    name: Literal["transformers", "vllm"] = Field(
        default="transformers", description="Engine in this process; vLLM is installed on its own."
    )
    url: list[Url] = Field(
        default=[], description="Base URL of a vLLM or SGLang server, in place of an engine; several share the work."
    )
    options: dict[str, Any] | None = Field(
        default=None, description="Arguments of vllm.LLM, such as tensor_parallel_size."
    )
    probe: str | None = Field(
        default=None,
        description="Store that transformers made of the same model, to check the engine where the model does not fit.",
    )
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Largest difference in nats between the engine and transformers at the check before a capture; by "
        "default 0.01 for float32 and 0.5 otherwise.",
    )
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="Seconds that a server may take to answer one request."
    )
    patience: Annotated[float, Field(ge=0)] = Field(
        default=300.0, description="Seconds for which a request is repeated while servers fail."
    )

    @model_validator(mode="after")
    def _one_engine(self) -> EngineSettings:
        if self.url and self.name != "transformers":
            raise ValueError(f"name is {self.name}, but {self.url[0]} is given too: leave one of them out")
        if self.options and self.kind != "vllm":
            raise ValueError(f"options are arguments of vllm.LLM, but the engine is {self.kind}")
        return self

    @property
    def kind(self) -> str:
        """``transformers``, ``vllm`` or ``server``."""
        return "server" if self.url else self.name


PATH = "Files, folders or hub ids of examples that nothing is trained on."


class LmEval(Settings):
    """Tasks of lm-eval on which every model is scored; a list of tasks alone is enough."""

    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        description="Names of tasks, groups or tags of lm-eval."
    )
    limit: Positive | None = Field(
        default=None, description="Most documents of each task, for a trial: figures of a part say little; null: all."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null: as each task says."
    )
    include_path: str | None = Field(
        default=None, description="Folder with your own tasks (YAML); lm-eval runs the Python code that they name."
    )
    chat_template: bool = Field(
        default=False, description="Apply the model's chat template to prompts, with few-shot examples as turns."
    )
    batch_size: Positive = Field(default=8, description="Requests per batch.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, list, str)):
            return value
        value = value if isinstance(value, Mapping) else {"tasks": value}
        tasks = value.get("tasks")
        return {**value, "tasks": tasks.split(",")} if isinstance(tasks, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        whole = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [whole["properties"]["tasks"], whole]}


class EvaluateSettings(Settings):
    """Held-out examples, and what is measured on them; also a recipe's section ``evaluate``."""

    path: str | list[str] = Field(default=[], description=PATH)
    name: str | None = Field(default=None, description="Configuration of a data set on the hub.")
    split: str = Field(default="test", description="Split of a data set on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a data set on the hub.")
    metrics: list[Literal["bits_per_byte", "exact_match"]] = Field(
        default=["bits_per_byte"],
        description="What to measure; `exact_match` generates the answers and takes longer.",
    )
    limit: Positive | None = Field(
        default=None, description="Most examples of each file, also of each file in a folder; null: all."
    )
    batch_tokens: Positive | None = Field(
        default=None, description="Tokens per batch, padding included; null: what suits the device."
    )
    lm_eval: LmEval | None = Field(
        default=None, description="Tasks of lm-eval, `[hellaswag, gsm8k]` (pip install 'mergekit-fusekit[lm-eval]')."
    )

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class GenerationSettings(Settings):
    """How the models write together. Each field is an option of ``fusekit generate``."""

    mode: Literal["cool", "unite", "safe"] = Field(
        default="safe",
        description="cool: segments chosen by perplexity. unite: the mean of all models at every token. "
        "safe: the first model writes, averaged with the others where it is unsure and all tokenizers have a boundary.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Stop after this many tokens of whoever writes.")
    segment: Literal["shortest", "aligned"] = Field(
        default="shortest",
        description="Where a segment of cool ends. shortest: at its writer's next word. "
        "aligned: at the first token end that every tokenizer shares.",
    )
    max_segment: int = Field(default=16, ge=1, description="Cut a segment of cool after this many tokens.")
    rerank: bool = Field(
        default=False, description="cool: each model also writes an answer alone; keep the answer of lowest perplexity."
    )
    top_k: int = Field(default=10, ge=1, description="unite: tokens that each model proposes. safe: entries averaged.")
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="safe: average where the first model's best token is less probable."
    )
    temperature: float = Field(default=0.0, ge=0, description="unite, safe: sample at this temperature; 0 is greedy.")
    seed: int = Field(default=0, ge=0, description="Random seed for sampling.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="Texts before which an answer ends; may be repeated."
    )
    raw: bool = Field(default=False, description="Continue prompts as raw text, without chat templates.")

    @model_validator(mode="after")
    def _fit(self) -> GenerationSettings:
        if self.mode != "cool":
            for name, asked in (("rerank", self.rerank), ("segment", self.segment != "shortest")):
                if asked:
                    raise ValueError(f"{name} belongs to mode cool, not {self.mode}")
        elif self.temperature:
            raise ValueError(f"mode cool is greedy: temperature is {self.temperature}, leave it at 0")
        return self

    @classmethod
    def of(cls, fields: dict[str, Any]) -> GenerationSettings:
        """The settings from a mapping. Raises GenerationError that names every wrong field and its value."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise GenerationError("; ".join(map(setting_problem, error.errors()))) from error


class Judge(Settings):
    """Who says which of several answers to a question is the best; it has one of the four kinds."""

    name: str | None = Field(default=None, description="What reports call it; null: the model, or the kind.")
    reward_model: str | None = Field(
        default=None, description="Folder or hub name of a sequence classification model of one output: the reward."
    )
    exact_match: bool = Field(
        default=False,
        description="Compare with the answers in the data, white space around them aside; no vote where all differ.",
    )
    bits_per_byte: bool = Field(
        default=False, description="The fewest bits per byte under the models that did not write it, the mean of them."
    )
    python: str | None = Field(
        default=None, description="`module:function` of (messages, answers, references); needs `allow_code`."
    )
    allow_code: bool = Field(default=False, description="Import and run the function that `python` names.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the reward model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Dtype of the reward model's weights; auto is the checkpoint's."
    )
    trust_remote_code: bool = Field(default=False, description="Run the Python code that comes with the reward model.")
    allow_pickle: bool = Field(default=False, description="Read pickled weights of the reward model.")

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or self._kinds[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def _kinds(self) -> list[str]:
        checks = [name for name in ("exact_match", "bits_per_byte") if getattr(self, name)]
        return [given for given in (self.reward_model, self.python) if given] + checks

    @model_validator(mode="after")
    def _one_kind(self) -> Judge:
        if len(self._kinds) != 1:
            what = " and ".join(self._kinds) or "none of them"
            raise ValueError(f"a judge has one of reward_model, exact_match, bits_per_byte and python, not {what}")
        if self.python and not self.allow_code:
            raise ValueError(f"{self.python} would be imported and run: set allow_code to true if it is to be trusted")
        if self.python and not all(self.python.partition(":")):
            raise ValueError(f"python is {self.python!r}: write it as module:function")
        return self


class RespondSettings(Settings):
    """Answers that the pivot and the sources write to the prompts of the data, and how the best one is chosen."""

    max_new_tokens: int = Field(default=512, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(default=0.0, ge=0, description="Sample answers at this temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample among the tokens that hold this probability.")
    seed: int = Field(default=0, ge=0, description="Random seed for sampling.")
    batch_size: int = Field(default=16, ge=1, description="Prompts answered, and answers judged, at once.")
    prompts_per_shard: int = Field(default=256, ge=1, description="Most prompts that an interruption may cost.")
    judges: Annotated[list[Judge], Field(min_length=1)] = Field(
        default=[Judge(bits_per_byte=True)],
        description="Each votes for the answer that it finds best, or the answers; of several with the most votes the "
        "one that the first judge prefers is chosen, then the second, and so on.",
    )

    @field_validator("judges")
    @classmethod
    def _named(cls, judges: list[Judge]) -> list[Judge]:
        labels = [judge.label for judge in judges]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two judges are called {twice[0]!r}: give one a `name` of its own")
        return judges
