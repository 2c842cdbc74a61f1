"""What is asked of :func:`fusekit.generation.generate`, and what it returns."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from fusekit.errors import FusekitError
from fusekit.yaml import Settings, setting_problem


class GenerationError(FusekitError):
    """Models, prompts or settings from which no text can be generated."""


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


class Segment(NamedTuple):
    """A piece of an answer, of whole characters.

    model: who wrote it: in ``unite``, and where ``safe`` averages, the model that found it most probable. score:
    ``cool``: mean perplexity, lower is better; else the probability that it was chosen with. scores: the same of every
    model that took part.
    """

    text: str
    model: str
    score: float
    scores: dict[str, float]


class Generation(NamedTuple):
    """An answer: the text of its segments together.

    finish: ``end`` of turn, ``stop`` (a text of ``stop``), ``length`` (``max_new_tokens``), or ``context`` (a model can
    read no more).
    """

    text: str
    segments: list[Segment]
    finish: str
