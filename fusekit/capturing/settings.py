"""The settings of a capture, for the recipe, the command and Python alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fusekit.errors import CaptureError
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

    def __post_init__(self) -> None:
        if self.k < 1:
            raise CaptureError(f"top_k is {self.k}; it must be at least 1")
        if not 0 < self.keep_mass <= 1:
            raise CaptureError(f"keep_mass is {self.keep_mass}; it must be above 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise CaptureError(f"temperature is {self.temperature}; it must be above 0 and finite")


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
