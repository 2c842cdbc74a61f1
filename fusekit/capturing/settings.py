"""The settings of a capture, for the recipe, the command and Python alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fusekit.yaml import Settings

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

    top_k: Annotated[int, Field(gt=0)] = Field(default=10, description="Most entries per label.")
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
    batch_tokens: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Most tokens of a batch, padding included; by default what suits the device."
    )
    max_error: Annotated[float, Field(ge=0, le=1)] = Field(
        default=DEFAULT_MAX_ERROR,
        description="Largest error of a stored log-probability in nats; 0 stores float32.",
    )
    rows_per_shard: Annotated[int, Field(gt=0)] | None = Field(
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
