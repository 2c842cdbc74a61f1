"""``fusekit clean``: what a run's output holds that the run no longer needs, or what stages made, to make it again."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.capturing.writer import OF_STORES
from fusekit.disk import disk_errors, output_lock
from fusekit.distillation.outputs import OVERWRITING
from fusekit.errors import StorageError
from fusekit.layout import NAMES, TRAINING, WORK, Layout, folders_in
from fusekit.pipeline.run import TABLE
from fusekit.pipeline.stage import Context
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(staging-[0-9a-f]{8}|previous-[0-9a-f]{8}|\d+\.tmp)")


@dataclass(frozen=True)
class Item:
    """Something to remove. path: a file or a folder. why: for people. nbytes: its size on disk."""

    path: Path
    why: str
    nbytes: int


@dataclass
class Findings:
    """What can go, and lines about what would go but for something in it that is not of the run."""

    items: list[Item] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return sum(item.nbytes for item in self.items)

    def add(self, layout: Layout, path: Path, why: str) -> None:
        """Take a path that exists, unless it holds something foreign, or is a link."""
        if path.is_symlink():
            self.spared.append(f"{path}: is a link, so what is there is not of this run: remove it yourself")
        elif found := _foreign(layout, path):
            self.spared.append(f"{path}: holds {found[0]}, which is not of the run: remove it yourself")
        elif path.exists():
            files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path]
            self.items.append(Item(path, why, sum(file.lstat().st_size for file in files)))


@contextmanager
def claimed(out: Path | str) -> Iterator[Layout]:
    """The layout of a run whose locks are held. Raises StorageError for a folder that is not a run, or is in use."""
    layout = Layout(Path(out).resolve())
    if not layout.recipe.is_file():
        raise StorageError(
            f"{layout.out} is not the output of a run: it has no {layout.recipe.name}; nothing was touched"
        )
    with ExitStack() as held:
        guarded = [path for path in (layout.targets, layout.baselines) if path.is_dir()]
        for path in (layout.out, *guarded, *folders_in(layout.store("")), *folders_in(layout.winners(""))):
            held.enter_context(output_lock(path))
        yield layout


def unneeded(layout: Layout, recipe: Recipe | None = None) -> Findings:
    """What the output holds that a run of the recipe does not use.

    recipe: None for the one that made what is there, and the one of a run that has begun since and is not finished.
    """
    recipes = [recipe] if recipe is not None else [load_recipe(p) for p in (layout.recipe, layout.begun) if p.is_file()]
    wanted = {path for known in recipes for stage in TABLE.values() for path in stage.wanted(Context(known, layout))}
    found = Findings()
    for path in _left_behind(layout):
        found.add(layout, path, "left behind by a process that died")
    for path in chain.from_iterable(stage.made(layout) for stage in TABLE.values()):
        result = path.with_name(path.name.removesuffix(TRAINING).removesuffix(WORK))
        if path.is_dir() and result not in wanted:
            found.add(layout, path, "the recipe does not ask for it")
        elif path.suffix == TRAINING and (result / artifact.MANIFEST).is_file() and not (path / OVERWRITING).exists():
            found.add(layout, path, "checkpoints of a training that is finished")
    return found


def made_by(layout: Layout, stages: Iterable[str]) -> Findings:
    """Everything that these stages made, to make it again, whatever recipe made it."""
    found = Findings()
    for stage in stages:
        for path in TABLE[stage].made(layout):
            found.add(layout, path, f"made by the stage {stage}")
    return found


def remove(items: Iterable[Item]) -> None:
    """Remove items. A folder is renamed first, so that no half of it is taken for the whole. Raises StorageError."""
    for item in items:
        with disk_errors(item.path, "cannot be removed"):
            if item.path.is_dir():
                name = item.path.name
                stale = _LEFT_BEHIND.fullmatch(name) is not None
                aside = item.path if stale else item.path.with_name(f".{name}.staging-{uuid.uuid4().hex[:8]}")
                item.path.rename(aside)
                shutil.rmtree(aside)
            else:
                item.path.unlink(missing_ok=True)


def _left_behind(layout: Layout) -> list[Path]:
    """Temporaries within the run's own folders; a former folder only where the one that replaced it is there."""
    found = []
    places = [layout.out]
    while places:
        place = places.pop()
        for path in sorted(place.iterdir()):
            match = _LEFT_BEHIND.fullmatch(path.name)
            if match and (place != layout.out or match["name"] in NAMES):
                if ".previous-" not in path.name or (place / match["name"]).exists():
                    found.append(path)
            elif path.is_dir() and not path.is_symlink() and (place != layout.out or path.name in NAMES):
                places += [] if path.name.endswith(TRAINING) else [path]
    return sorted(found)


def _foreign(layout: Layout, path: Path) -> list[str]:
    """What is not of a run in something that one of its stages made."""
    if not path.is_dir() or _LEFT_BEHIND.fullmatch(path.name) or (path / artifact.MADE_FROM).is_file():
        return []
    if path.parent in (layout.store(""), layout.winners("")):
        return [file.name for file in sorted(path.iterdir()) if not OF_STORES.fullmatch(file.name)]
    try:
        return artifact.foreign(path)
    except StorageError:
        return [artifact.MANIFEST]
