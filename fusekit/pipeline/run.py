"""``fusekit run``: the stages of a recipe in order, each only where something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file, output_lock, remove
from fusekit.devices import Processes
from fusekit.errors import RecipeError, StorageError
from fusekit.pipeline import checks, distilling, evaluating, merging, report_stage, stages
from fusekit.pipeline.layout import OURS, STAGES, Layout
from fusekit.pipeline.log import RunLog
from fusekit.pipeline.readers import Readers
from fusekit.pipeline.stages import Context
from fusekit.recipe import Recipe, load_recipe
from fusekit.yaml import nearest


@dataclass(frozen=True)
class Run:
    """What a run made. out: the folder. targets: of the distillation. results: scores by model, None without."""

    out: Path
    targets: list[Path]
    results: dict[str, Any] | None


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        needs: the stages whose artifacts it reads.
        do: makes what is missing; called in every process.
        check: refuses artifacts that are not there, or were made from something else; called in the first process.
            Of a stage that others need.
    """

    needs: tuple[str, ...]
    do: Callable[[Context, Processes], object]
    check: Callable[[Context], object] = lambda _: None


def _capture(context: Context, processes: Processes) -> None:
    for name in context.readers.names:
        for line in context.readers.checkpoint(name).notices:
            context.say(f"capture {name}: {line}")
        with report_stage.timed(context, name, processes.is_first):
            stages.capture(context, name, context.rows)
    processes.first_then_all(partial(report_stage.describe, context))


def _align(context: Context, processes: Processes) -> None:
    for source in context.recipe.sources:
        processes.first_then_all(partial(stages.align, context, source.label, context.rows))


def _distill(context: Context, processes: Processes) -> None:
    processes.first_then_all(partial(distilling.check_made, context))
    distilling.distill(context)


def _evaluate(context: Context) -> None:
    distilling.check_baseline(context)  # only this stage needs it
    evaluating.evaluate(context)


def _in_first(do: Callable[[Context], object]) -> Callable[[Context, Processes], object]:
    """Work that one process does for all. What it returns stays there."""

    def alone(context: Context, processes: Processes) -> None:
        def work() -> None:
            do(context)

        processes.first_then_all(work)

    return alone


_STAGES: dict[str, Stage] = {
    "data": Stage((), _in_first(stages.data), stages.check_data),
    "capture": Stage(("data",), _capture, checks.check_stores),
    "align": Stage(("data",), _align, checks.check_alignments),
    "distill": Stage(("data", "capture", "align"), _distill, distilling.check_targets),
    "merge": Stage(("data", "distill"), _in_first(merging.merge), merging.check_merged),
    "evaluate": Stage(("data", "distill", "merge"), _in_first(_evaluate)),
    # Reads what is there of all others, and says what is not.
    "report": Stage((), _in_first(report_stage.report)),
}
_DECIDE = {"data", "distill", "merge"}
"""Stages that tell, done or checked, that what is there is of the recipe."""


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    only: str | Iterable[str] | None = None,
    start: str | None = None,
    until: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    merge_options: Mapping[str, Any] | None = None,
    ignore_estimates: bool = False,
) -> Run:
    """Do what is missing of a recipe, and nothing else.

    A run that was stopped, at any moment, goes on when it is started again. Under ``accelerate launch`` or ``torchrun``
    every process calls this: captures and training are shared, the rest is done by the first.

    Args:
        recipe: what to do.
        out: folder of the run; its artifacts are those of :class:`Layout`.
        only: a stage, or several; what they need of the others has to be there, and is checked.
        start: the first stage to do; what later ones need of those before it has to be there, and is checked.
        until: the last stage to do.
        say: gets a line of plain text for the user.
        quiet: no progress of captures.
        merge_options: fields of mergekit's MergeOptions, for the stage ``merge``.
        ignore_estimates: start stages although disk or memory do not seem to suffice.

    Raises:
        FusekitError: what each stage raises; an output in use, or that holds something else; inputs that are not
            those that an artifact was made from (with both values).
    """
    chosen = chosen_stages(only, start, until)
    layout, processes = Layout(Path(out).resolve()), Processes.current()
    log = RunLog(layout.logs)

    def tell(line: str) -> None:
        if processes.is_first:
            log.write(line)
            say(line)

    readers = Readers(recipe, layout)
    context = Context(recipe, layout, readers, tell, quiet, dict(merge_options or {}), ignore_estimates)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(output_lock(layout.out))
            _claim(context, chosen)
            held.enter_context(log.around())

        # Before the output is touched: a recipe that cannot be done leaves nothing behind.
        processes.first_then_all(lambda: checks.check_recipe(recipe, chosen))
        processes.first_then_all(claim)
        if chosen != ["report"]:
            processes.first_then_all(partial(stages.dequantised_pivot, context))
        if "evaluate" in chosen:
            processes.first_then_all(partial(evaluating.check_held_out, context))
        needed = {need for name in chosen for need in _STAGES[name].needs}
        for name in STAGES:
            if name == "report" and name in chosen:
                processes.first_then_all(lambda: _settle(layout, recipe, {*chosen, *needed} >= _DECIDE))
            if name in chosen:
                _STAGES[name].do(context, processes)
            elif name in needed:
                _in_first(_STAGES[name].check)(context, processes)
        if {*chosen, *needed} >= _DECIDE:
            processes.first_then_all(lambda: _save(layout, recipe))
        return _made(context, chosen)


def chosen_stages(only: str | Iterable[str] | None, start: str | None, until: str | None) -> list[str]:
    """The stages to do, in order. Raises RecipeError for an unknown one, and for requests that leave none or clash."""
    alone = [only] if isinstance(only, str) else list(only or ())
    for stage in (*alone, start, until):
        if stage is not None and stage not in STAGES:
            raise RecipeError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    if alone and (start or until):
        raise RecipeError("--only is one stage, --from and --until are the ends of several: give one or the other")
    if alone:
        return [stage for stage in STAGES if stage in alone]
    first, last = STAGES.index(start or STAGES[0]), STAGES.index(until or STAGES[-1])
    if first > last:
        raise RecipeError(f"--from {start} comes after --until {until}: nothing is left to do between them")
    return list(STAGES[first : last + 1])


def _made(context: Context, chosen: list[str]) -> Run:
    after = {"distill", "merge", "evaluate"} & set(chosen)
    results = None
    if "evaluate" in chosen and context.recipe.evaluate is not None:
        results = json.loads(context.layout.results.read_text(encoding="utf-8"))
    return Run(context.layout.out, context.targets if after else [], results)


def _claim(context: Context, chosen: list[str]) -> None:
    """Refuse a folder that holds something else; save the recipe of the first run."""
    layout, recipe = context.layout, context.recipe
    layout.out.mkdir(parents=True, exist_ok=True)
    if foreign := foreign_to_runs(layout):
        raise StorageError(foreign)
    checks.check_places(context, chosen)
    if not layout.recipe.exists():  # a later one that is refused shall not be said to have made what is there
        _save(layout, recipe)
    elif layout.recipe.read_bytes() != _text(recipe):
        layout.logs.mkdir(exist_ok=True)
        commit_file(layout.begun, lambda file: file.write(_text(recipe)))


def _settle(layout: Layout, recipe: Recipe, decided: bool) -> None:
    """Let the report be of the recipe that made what is there. Raises StorageError for another that did not."""
    if decided:
        _save(layout, recipe)
        return
    before = load_recipe(layout.recipe)
    if changed := artifact.differences(before.model_dump(mode="json"), recipe.model_dump(mode="json")):
        raise StorageError(
            f"{layout.out} was made by another recipe, of which a report would be:\n  "
            + "\n  ".join(changed)
            + f"\nLet the other stages run first, or make the report of what is there: fusekit report {layout.out}"
        )


def foreign_to_runs(layout: Layout) -> str | None:
    """Why a folder that exists is not the output of a run, None where it is one or empty. Raises OSError.

    Files of a run are there only beside its recipe; of folders that are called like a run's the stages ask further.
    """
    if layout.recipe.exists():
        return None
    there = sorted(path for path in layout.out.iterdir() if not path.name.startswith("."))
    foreign = [path.name for path in there if path.name not in OURS or path.is_file()]
    if not foreign:
        return None
    return f"{layout.out} is no run of fusekit, but holds {foreign[0]!r}: choose another folder, or empty it"


def _save(layout: Layout, recipe: Recipe) -> None:
    """Save the recipe with every value written out: what is there is of it by now."""
    commit_file(layout.recipe, lambda file: file.write(_text(recipe)))
    remove(layout.begun)


def _text(recipe: Recipe) -> bytes:
    head = "# The recipe of this run, every value written out: fusekit run recipe.resolved.yml OUT repeats it.\n"
    return (head + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)).encode()
