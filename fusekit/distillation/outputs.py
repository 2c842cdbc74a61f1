"""The models that a run makes, and where: known before torch's trainer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """The models that settings ask for: one per source, one from all, or, at lm_weight 1, one from the text alone.

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
