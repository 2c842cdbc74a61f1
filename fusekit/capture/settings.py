"""The settings of a capture, for the recipe, the command and Python alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_MAX_ERROR = 0.2


class CaptureSettings(BaseModel):
    """What is kept of a model's distributions, and how it is captured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Annotated[int, Field(gt=0)] = Field(default=10, description="Most entries per label.")
    keep_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Keep fewer entries once they hold this probability."
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Temperature of the distributions that are kept; the cross-entropy is always of temperature 1.",
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
