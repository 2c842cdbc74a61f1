"""``fusekit clean``: what a run's output holds that the run no longer needs, or that a stage shall make anew."""

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
from fusekit.distillation.outputs import NOTE, PLAIN, targets_of
from fusekit.errors import StorageError
from fusekit.evaluation import lm_eval
from fusekit.gguf import SUFFIX
from fusekit.pipeline.layout import BASELINE, MERGED, OURS, PIVOT, STAGES, Layout
from fusekit.recipe import Recipe, load_recipe

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(staging-[0-9a-f]{8}|previous-[0-9a-f]{8}|\d+\.tmp)")
_OF_TRAININGS = re.compile(r"made_from\.json|checkpoint-\d+|trainer_state\.json|runs|\..*\.\d+\.tmp")
WORK = ".training"


@dataclass(frozen=True)
class Item:
    """Something to remove. path: a file or a folder. why: for people. nbytes: that it takes."""

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
        """That all items take."""
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
        raise StorageError(f"{layout.out} is no run of fusekit: it has no {layout.recipe.name}; nothing was touched")
    with ExitStack() as held:
        stores = layout.out / "captures"
        names = sorted(path for path in stores.iterdir() if path.is_dir()) if stores.is_dir() else []
        guarded = [path for path in (layout.targets, layout.baselines) if path.is_dir()]
        for path in (layout.out, *guarded, *(name for name in names if not name.name.startswith("."))):
            held.enter_context(output_lock(path))
        yield layout


def unneeded(layout: Layout, recipe: Recipe | None = None) -> Findings:
    """What the output holds that a run of the recipe does not use: all of it can go, and nothing is made anew for it.

    recipe: None for the one that made what is there, and the one of a run that has begun since and is not finished.
    Raises RecipeError, StorageError.
    """
    recipes = [recipe] if recipe is not None else [load_recipe(path) for path in _recipes_of(layout)]
    found = Findings()
    for path in _left_behind(layout):
        found.add(path, "left behind by a process that died", lambda _: [])
    sources = {source.label for known in recipes for source in known.sources}
    _others(found, layout.out / "captures", {PIVOT, *sources}, "the recipe names no such model", _in_store)
    _others(found, layout.out / "alignment", sources, "the recipe names no such source", _in_artifact)
    targets = {name for known in recipes for name in _targets(known)}
    baseline = any(known.wants_baseline for known in recipes)
    for folder, wanted in ((layout.targets, targets), (layout.baselines, {PLAIN} if baseline else set())):
        _others(found, folder, wanted, "the recipe asks for no such target", _in_artifact)
        _trainings(found, folder, wanted)
    if not any(known.pivot.path.endswith(SUFFIX) for known in recipes):
        found.add(layout.pivot, "the recipe's pivot is no GGUF file", _in_artifact)
    merges = any(known.merge is not None for known in recipes)
    if not merges:
        found.add(layout.merged, "the recipe merges nothing", _in_artifact)
    models = {PIVOT, *(f"sources/{name}" for name in sources), *(f"targets/{name}" for name in targets)}
    models |= {name for name, wanted in ((MERGED, merges), (BASELINE, baseline)) if wanted}
    tasks = {
        lm_eval.folder_of(task.task)
        for known in recipes
        if known.evaluate is not None and known.evaluate.lm_eval is not None
        for task in known.evaluate.lm_eval.tasks
    }
    _scores(found, layout, models, tasks)
    return found


def made_by(layout: Layout, stages: Iterable[str]) -> Findings:
    """Everything that these stages made, to make it anew."""
    found = Findings()
    for stage in stages:
        why = f"made by the stage {stage}"
        for path in _of_stage(layout, stage):
            if path.name.endswith(WORK):
                found.add(path, why, _in_training)
            else:
                found.add(path, why, _in_store if stage == "capture" else _in_artifact)
    return found


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


def _recipes_of(layout: Layout) -> list[Path]:
    return [path for path in (layout.recipe, layout.begun) if path.is_file()]


def _targets(recipe: Recipe) -> set[str]:
    names = [source.label for source in recipe.sources]
    return {target.name for target in targets_of(recipe.settings, names, Path())}


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _others(found: Findings, folder: Path, wanted: set[str], why: str, foreign: Callable[[Path], list[str]]) -> None:
    for path in _folders(folder):
        if path.name not in wanted and not path.name.endswith(WORK):
            found.add(path, why, foreign)


def _trainings(found: Findings, folder: Path, wanted: set[str]) -> None:
    """Checkpoints of targets that are whole, or that nobody wants. One that is being made anew keeps its own."""
    anew = (folder / NOTE).exists()
    for path in _folders(folder):
        name = path.name.removesuffix(WORK)
        if name == path.name:
            continue
        if name not in wanted:
            found.add(path, "checkpoints of a target that the recipe does not ask for", _in_training)
        elif (folder / name / artifact.MANIFEST).is_file() and not anew:
            found.add(path, "checkpoints of a training that is finished", _in_training)


def _scores(found: Findings, layout: Layout, models: set[str], tasks: set[str]) -> None:
    """Scores of models that nobody names, and of lm-eval's tasks that nobody asks for."""
    for place in _scored(layout):
        first, *rest = place.relative_to(layout.evaluation("")).parts
        if first == lm_eval.FOLDER:
            *model, task = rest
            wanted = task in tasks
        else:
            model, wanted = [first, *rest], True
        if "/".join(model) not in models:
            found.add(place, "scores of a model that the recipe does not name", _in_artifact)
        elif not wanted:
            found.add(place, "scores of a task that the recipe does not ask for", _in_artifact)


def _scored(layout: Layout) -> list[Path]:
    folder = layout.evaluation("")
    places = [path.parent for path in sorted(folder.rglob(artifact.MANIFEST))]
    places = [place for place in places if place not in (folder, folder / lm_eval.FOLDER)]  # not of ours there
    return [place for place in places if not any(part.startswith(".") for part in place.relative_to(folder).parts)]


def _of_stage(layout: Layout, stage: str) -> list[Path]:
    return {
        "data": [layout.data],
        "capture": _folders(layout.out / "captures"),
        "align": _folders(layout.out / "alignment"),
        "distill": [*_folders(layout.targets), *_folders(layout.baselines)],
        "merge": [layout.merged, layout.merge_recipe],
        "evaluate": [*_scored(layout), layout.results],
        "report": [layout.report, layout.models],
    }.get(stage, [])


def from_stage(first: str) -> tuple[str, ...]:
    """A stage and all after it."""
    return STAGES[STAGES.index(first) :]


def _left_behind(layout: Layout) -> list[Path]:
    """Temporaries within the run's own folders; a former folder only where the one that replaced it is there."""
    found = []
    places = [layout.out]
    while places:
        place = places.pop()
        for path in sorted(place.iterdir()):
            match = _LEFT_BEHIND.fullmatch(path.name)
            if match and (place != layout.out or match["name"] in OURS):
                if ".previous-" not in path.name or (place / match["name"]).exists():
                    found.append(path)
            elif path.is_dir() and not path.is_symlink() and (place != layout.out or path.name in OURS):
                places += [] if path.name.endswith(WORK) else [path]
    return sorted(found)


def _in_artifact(folder: Path) -> list[str]:
    """What in a folder its manifest does not list; one that cannot be read vouches for nothing."""
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


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
