"""``fusekit clean``: what a run's output holds that the run no longer needs, or that a stage shall make again."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.artifacts import disk_fault, output_lock
from fusekit.capturing.writer import OF_STORES
from fusekit.distillation.outputs import NOTE
from fusekit.errors import StorageError
from fusekit.evaluation import lm_eval
from fusekit.layout import NAMES, PIVOT, SHARDS, Layout
from fusekit.pipeline import evaluating
from fusekit.pipeline.context import Context
from fusekit.pipeline.run import TABLE
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(staging-[0-9a-f]{8}|previous-[0-9a-f]{8}|\d+\.tmp)")
_OF_SHARDS = re.compile(r"made_from\.json|(judge-\d+-)?shard-\d+\.json|\..*\.\d+\.tmp")
_OF_TRAININGS = re.compile(r"made_from\.json|checkpoint-\d+|trainer_state\.json|runs|\..*\.\d+\.tmp")
WORK = ".training"


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

    def add(self, path: Path, why: str, foreign: Callable[[Path], list[str]]) -> None:
        """Take a path that exists, unless it holds something foreign, or is a link."""
        if path.is_symlink():
            self.spared.append(f"{path}: is a link, so what is there is not of this run: remove it yourself")
        elif found := foreign(path) if path.is_dir() else []:
            self.spared.append(f"{path}: holds {found[0]}, which is not of the run: remove it yourself")
        elif path.exists():
            self.items.append(Item(path, why, _size(path)))


@contextmanager
def claimed(out: Path | str) -> Iterator[Layout]:
    """The layout of a run whose locks are held. Raises StorageError for a folder that is no run, or one in use."""
    layout = Layout(Path(out).resolve())
    if not layout.recipe.is_file():
        raise StorageError(
            f"{layout.out} is not the output of a run: it has no {layout.recipe.name}; nothing was touched"
        )
    with ExitStack() as held:
        guarded = [path for path in (layout.targets, layout.baselines) if path.is_dir()]
        for path in (layout.out, *guarded, *_folders(layout.store("")), *_folders(layout.winners(""))):
            held.enter_context(output_lock(path))
        yield layout


def unneeded(layout: Layout, recipe: Recipe | None = None) -> Findings:
    """What the output holds that a run of the recipe does not use: all of it can go, and nothing is made again for it.

    recipe: None for the one that made what is there, and the one of a run that has begun since and is not finished.

    Raises RecipeError, StorageError.
    """
    recipes = [recipe] if recipe is not None else [load_recipe(p) for p in (layout.recipe, layout.begun) if p.is_file()]
    wanted = {folder for known in recipes for folder in _asked_for(known, layout)}
    found = Findings()
    for path in _left_behind(layout):
        found.add(path, "left behind by a process that died", lambda _: [])
    for places in _made(layout).values():
        for path in places:
            result = path.with_name(path.name.removesuffix(WORK).removesuffix(SHARDS))
            if path.is_dir() and result not in wanted:
                found.add(path, "the recipe does not ask for it", _foreign_to(layout, path))
            elif (
                path.name.endswith(WORK)
                and (result / artifact.MANIFEST).is_file()
                and not (path.parent / NOTE).exists()
            ):
                found.add(path, "checkpoints of a training that is finished", _in_training)
    return found


def made_by(layout: Layout, stages: Iterable[str]) -> Findings:
    """Everything that these stages made, to make it again, whatever recipe made it."""
    found, made = Findings(), _made(layout)
    for stage in stages:
        for path in made[stage]:
            found.add(path, f"made by the stage {stage}", _foreign_to(layout, path))
    return found


def _asked_for(recipe: Recipe, layout: Layout) -> list[Path]:
    """The folders of a recipe's artifacts."""
    context = Context(recipe, layout)
    folders = [folder for stage in TABLE.values() for folder in stage.artifacts(context).values()]
    return folders + evaluating.lm_eval_folders(context)


def _made(layout: Layout) -> dict[str, list[Path]]:
    """What stages may have made, whatever recipe asked for it, by stage."""
    return {
        PIVOT: [layout.pivot],
        "data": [layout.data],
        "respond": _folders(layout.responses("")),
        "judge": [layout.judged, layout.shards(layout.judged), *_folders(layout.winners(""))],
        "capture": _folders(layout.store("")),
        "align": _folders(layout.alignment("")),
        "distill": [*_folders(layout.targets), *_folders(layout.baselines)],
        "merge": [layout.merged, layout.merge_recipe],
        "evaluate": [*_scored(layout), layout.results],
        "report": [layout.report, layout.models],
    }


def remove(items: Iterable[Item]) -> None:
    """Remove items. A folder is renamed first, so that no half of it is ever taken for the whole.

    Raises StorageError naming what could not be removed; what was removed before stays so.
    """
    for item in items:
        try:
            if item.path.is_dir():
                name = item.path.name
                stale = _LEFT_BEHIND.fullmatch(name) is not None
                aside = item.path if stale else item.path.with_name(f".{name}.staging-{uuid.uuid4().hex[:8]}")
                item.path.rename(aside)
                shutil.rmtree(aside)
            else:
                item.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault(error, item.path) or StorageError(f"{item.path} cannot be removed: {error}") from error


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _scored(layout: Layout) -> list[Path]:
    """Folders of scores, those of tasks of lm-eval too."""
    folder = layout.evaluation("")
    places = [path.parent for path in sorted(folder.rglob(artifact.MANIFEST))]
    places = [place for place in places if place not in (folder, folder / lm_eval.FOLDER)]  # not of a run there
    return [place for place in places if not any(part.startswith(".") for part in place.relative_to(folder).parts)]


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
                places += [] if path.name.endswith(WORK) else [path]
    return sorted(found)


def _foreign_to(layout: Layout, path: Path) -> Callable[[Path], list[str]]:
    """How to find what is not of a run in something that one of its stages made."""
    if path.suffix in (WORK, SHARDS):
        return _in_training if path.suffix == WORK else _in_shards
    return _in_store if path.parent in (layout.store(""), layout.winners("")) else _in_artifact


def _in_artifact(folder: Path) -> list[str]:
    """Files that the manifest of a folder does not list; the manifest itself where it cannot be read."""
    try:
        return artifact.foreign(folder)
    except StorageError:
        return [artifact.MANIFEST]


def _in_store(folder: Path) -> list[str]:
    names = [path.name for path in sorted(folder.iterdir())]
    if not any(name.startswith(("manifest", "shard-")) for name in names):
        return names
    return [name for name in names if not OF_STORES.fullmatch(name)]


def _in_training(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.iterdir()) if not _OF_TRAININGS.fullmatch(path.name)]


def _in_shards(folder: Path) -> list[str]:
    stores = [store for store in _folders(folder) if not _in_store(store)]  # of a judgement by bits per byte
    names = [path.name for path in sorted(folder.iterdir()) if path not in stores]
    return [name for name in names if not _OF_SHARDS.fullmatch(name)]


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
