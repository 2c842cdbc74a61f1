"""How good a model is on held-out examples: bits per byte, exact match by generation, and tasks of lm-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.evaluation.metrics import bits_per_byte, evaluate, exact_match

__all__ = ["bits_per_byte", "evaluate", "exact_match"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fusekit.evaluation import metrics  # imports torch, which takes a second

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
