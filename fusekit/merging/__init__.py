"""A safe merge: lint, estimate, run mergekit, check the result, publish it in one step.

``merge(recipe, out)`` does all of it, ``check(recipe, out)`` says what it would do; on the command line they are
``fusekit merge`` and ``fusekit merge --check``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.merging.models import Settings
    from fusekit.merging.run import Check, Merged, check, merge

__all__ = ["Check", "Merged", "Settings", "check", "merge"]


def __getattr__(name: str) -> Any:
    # mergekit takes seconds to import: only when something is merged.
    if name in __all__:
        from fusekit.merging import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
