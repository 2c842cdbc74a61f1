"""The models that a run makes, and where: known before torch's trainer is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.distillation.settings import DistillSettings
from fusekit.errors import DistillationError

FACTS = "made_from.json"
JOINT, PLAIN = "joint", "sft"


@dataclass(frozen=True)
class Target:
    """A model that a run makes. ``sources`` are the names of those that teach it."""

    name: str
    folder: Path
    sources: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Where its checkpoints are until it is published."""
        return self.folder.parent / f"{self.name}.training"


def targets_of(settings: DistillSettings, sources: Sequence[str], out: Path) -> list[Target]:
    """The models that settings ask for: one per source, one from all, or, of plain settings, one from the text alone.

    Raises DistillationError when there is no source to learn from, or one has a name that cannot be a folder's.
    """
    for name in sources:
        if not name or name in (JOINT, PLAIN, "pivot") or "/" in name or name.startswith("."):
            raise DistillationError(f"a source cannot be called {name!r}: its name becomes a folder of the output")
    if settings.plain:
        return [Target(PLAIN, out / PLAIN, ())]
    if not sources:
        raise DistillationError("there is no source to learn from: name one, or set lm_weight to 1 (preset sft)")
    if settings.fusion.mode == "joint":
        return [Target(JOINT, out / JOINT, tuple(sources))]
    return [Target(name, out / name, (name,)) for name in sources]


def facts_begun(target: Target) -> dict[str, Any] | None:
    """What a training that was begun is made from, None where none was. Raises DistillationError for a damaged file."""
    path = target.work / FACTS
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DistillationError(f"{path} cannot be read: {error}; remove {target.work} to begin anew") from error
    if not isinstance(found, dict) or not found:
        raise DistillationError(f"{path} cannot be read: it holds no facts; remove {target.work} to begin anew")
    return found
