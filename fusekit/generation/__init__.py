"""Several models write one text: token by token (UniTE), at safe boundaries (SAFE) or by segments (Cool-Fusion).

>>> from fusekit.generation import generate
>>> [answer] = generate(["demo/models/pivot", "demo/sources/qwen"], "57+68=", mode="safe", max_new_tokens=8)
>>> answer.text, [(segment.text, segment.model) for segment in answer.segments]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusekit.errors import GenerationError
from fusekit.settings import GenerationSettings

if TYPE_CHECKING:
    from fusekit.generation.ensemble import Generation, Segment, generate

__all__ = ["Generation", "GenerationError", "GenerationSettings", "Segment", "generate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fusekit.generation import ensemble  # imports torch, which takes a second

        return getattr(ensemble, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
