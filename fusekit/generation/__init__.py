"""Several models write one text: token by token (UniTE), at safe boundaries (SAFE) or by segments (Cool-Fusion).

>>> from fusekit.generation import generate
>>> [answer] = generate(["demo/models/pivot", "demo/sources/qwen"], "57+68=", mode="safe", max_new_tokens=8)
>>> answer.text, [(segment.text, segment.model) for segment in answer.segments]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusekit.generation.settings import Generation, GenerationError, GenerationSettings, Segment

if TYPE_CHECKING:
    from fusekit.generation.ensemble import generate

__all__ = ["Generation", "GenerationError", "GenerationSettings", "Segment", "generate"]


def __getattr__(name: str) -> Any:
    if name != "generate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusekit.generation.ensemble import generate  # imports torch, which takes a second

    return generate
