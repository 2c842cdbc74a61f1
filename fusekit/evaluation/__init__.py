"""How good a model is on held-out rows: bits per byte, and exact match by generation.

Both are comparable between models of any tokenizer: the first is over bytes, the second over text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.evaluation.metrics import METRICS, Score, bits_per_byte, exact_match

__all__ = ["METRICS", "Score", "bits_per_byte", "exact_match"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: only when something is evaluated.
    if name in __all__:
        from fusekit.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
