"""Several models write one text: token by token (UniTE), at safe boundaries (SAFE) or by segments (Cool-Fusion).

>>> from fusekit.generation import generate
>>> [answer] = generate(["demo/models/pivot", "demo/sources/qwen"], "57+68=", mode="safe", max_new_tokens=8)
>>> answer.text, [(segment.text, segment.model) for segment in answer.segments]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.generation.ensemble import generate
    from fusekit.generation.settings import Generation, GenerationError, GenerationSettings, Segment

__all__ = ["Generation", "GenerationError", "GenerationSettings", "Segment", "generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "ensemble" if name == "generate" else "settings"  # the settings do without torch
    return getattr(import_module(f"{__name__}.{module}"), name)
