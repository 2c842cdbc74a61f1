"""``fusekit run``: the stages of a recipe in order, each only where something is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusekit.errors import RecipeError, StorageError
from fusekit.pipeline import stages
from fusekit.pipeline.layout import Layout
from fusekit.pipeline.readers import Readers
from fusekit.pipeline.stages import Context
from fusekit.problems import nearest
from fusekit.recipe import Recipe
from fusekit.representation import Row
from fusekit.storage import commit_file, output_lock

STAGES = ("data", "represent", "align", "distill", "merge", "evaluate")
"""In order. Each needs what those before it made."""

_OURS = {
    "recipe.resolved.yml",
    "data",
    "representations",
    "alignment",
    "targets",
    "baselines",
    "merge.yml",
    "merged",
    "evaluation",
    "results.json",
}


@dataclass(frozen=True)
class Run:
    """What a run made. out: the folder. targets: of the distillation. results: scores by model, None without."""

    out: Path
    targets: list[Path]
    results: dict[str, Any] | None


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    only: str | None = None,
    until: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Run:
    """Do what is missing of a recipe, and nothing else.

    A run that was stopped, at any moment, goes on when it is started again. Under ``accelerate launch`` or ``torchrun``
    every process calls this: captures and training are shared, the rest is done by the first.

    Args:
        recipe: what to do.
        out: folder of the run; its artifacts are those of :class:`Layout`.
        only: a stage; those before it have to be done already.
        until: the last stage to do.
        say: gets a line of plain text for the user.
        quiet: no progress of captures.

    Raises:
        FusekitError: what each stage raises; an output in use, or that holds something else; inputs that are not
            those that an artifact was made from (with both values).
    """
    from fusekit.representation.processes import Processes

    for stage in (only, until):
        if stage is not None and stage not in STAGES:
            raise RecipeError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    chosen = [only] if only else list(STAGES[: STAGES.index(until) + 1] if until else STAGES)
    layout, processes = Layout(Path(out).resolve()), Processes.current()
    tell = say if processes.is_first else lambda _line: None
    context = Context(recipe, layout, Readers(recipe), tell, quiet)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(output_lock(layout.out))
            _claim(layout, recipe)

        processes.first_then_all(claim)
        done = _stages(context, chosen, processes)
        processes.first_then_all(lambda: _save(layout, recipe))
        return done


def _stages(context: Context, chosen: Sequence[str], processes: Any) -> Run:
    layout, targets, results = context.layout, [], None
    processes.first_then_all(lambda: stages.data(context) if "data" in chosen else stages.check_data(context))
    rows = _rows(context)
    if "represent" in chosen:
        for name in context.readers.names:
            stages.represent(context, name, rows)
    if "align" in chosen:
        for source in context.recipe.sources:
            processes.first_then_all(lambda source=source: stages.align(context, source.label, rows))
    if "distill" in chosen:
        targets = stages.distill(context, rows)
    if {"merge", "evaluate"} & set(chosen):
        targets = targets or _targets(context)
    if "merge" in chosen:
        processes.first_then_all(lambda: stages.merge(context, targets))
    if "evaluate" in chosen:
        results = processes.first_then_all(lambda: stages.evaluate(context, targets))
    return Run(layout.out, targets, results)


def _rows(context: Context) -> list[Row]:
    from fusekit.pipeline.rows_file import read_rows_file

    return read_rows_file(context.layout.data)


def _targets(context: Context) -> list[Path]:
    from fusekit.distillation.run import targets_of

    names = [source.label for source in context.recipe.sources]
    found = [target.folder for target in targets_of(context.recipe.settings, names, context.layout.targets)]
    missing = [path for path in found if not path.is_dir()]
    if missing:
        raise StorageError(f"{missing[0]} is not there: the stage `distill` comes first")
    return found


def _claim(layout: Layout, recipe: Recipe) -> None:
    """Refuse a folder that holds something else; save the recipe of the first run."""
    layout.out.mkdir(parents=True, exist_ok=True)
    if foreign := foreign_to_runs(layout):
        raise StorageError(foreign)
    if not layout.recipe.exists():  # a later one that is refused shall not be said to have made what is there
        _save(layout, recipe)


def foreign_to_runs(layout: Layout) -> str | None:
    """Why a folder that exists is not the output of a run, None where it is one or empty. Raises OSError."""
    foreign = sorted(p.name for p in layout.out.iterdir() if p.name not in _OURS and not p.name.startswith("."))
    if not foreign or layout.recipe.exists():
        return None
    return f"{layout.out} is no run of fusekit, but holds {foreign[0]!r}: choose another folder, or empty it"


def _save(layout: Layout, recipe: Recipe) -> None:
    """Save the recipe with every value written out."""
    head = "# The recipe of this run, every value written out: fusekit run recipe.resolved.yml OUT repeats it.\n"
    text = head + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    commit_file(layout.recipe, lambda file: file.write(text.encode()))
