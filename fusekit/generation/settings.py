"""What is asked of :func:`fusekit.generation.generate`, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusekit.errors import FusekitError


class GenerationError(FusekitError):
    """Models, prompts or settings from which no text can be generated."""


class GenerationSettings(BaseModel):
    """How the models write together. Each field is an option of ``fusekit generate``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
            problems = []
            for problem in error.errors(include_url=False):
                name = ".".join(map(str, problem["loc"]))
                what = f"{name} = {problem['input']!r}: " if name else ""
                problems.append(what + problem["msg"].removeprefix("Value error, "))
            raise GenerationError("; ".join(problems)) from error


class Segment(NamedTuple):
    """A piece of an answer.

    Attributes:
        text: whole characters.
        model: who wrote it: in ``unite``, and where ``safe`` averages, the model that found it most probable.
        score: ``cool``: mean perplexity, lower is better; else the probability that it was chosen with.
        scores: the same of every model that took part: perplexity, or probability.
    """

    text: str
    model: str
    score: float
    scores: dict[str, float]


class Generation(NamedTuple):
    """An answer.

    Attributes:
        text: of the segments together.
        segments: in order.
        finish: ``end`` of turn, ``length`` (``max_new_tokens``), or ``context`` (a model can read no more).
    """

    text: str
    segments: list[Segment]
    finish: str


def drain(
    running: Generator[Segment, None, str], on_segment: Callable[[Segment], None] | None = None
) -> tuple[list[Segment], str]:
    """All segments of an answer that is being written, and why it ended. on_segment: called with each as it comes."""
    segments: list[Segment] = []
    while True:
        try:
            segments.append(next(running))
        except StopIteration as stopped:
            return segments, str(stopped.value)
        if on_segment is not None:
            on_segment(segments[-1])
