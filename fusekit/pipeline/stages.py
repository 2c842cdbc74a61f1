"""The stages of a run, each as functions: which artifacts it makes, what their status is, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.devices import Processes
from fusekit.errors import RecipeError, StorageError
from fusekit.layout import BASELINE, PIVOT, STAGES, Layout
from fusekit.pipeline import capturing, distilling, evaluating, merging, responding
from fusekit.pipeline.context import BEGUN, MISSING, Context, Status
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Mistake
from fusekit.yaml import nearest


@dataclass(frozen=True)
class Stage:
    """One step of a run. Its artifacts have names: of models, pairs or targets.

    Attributes:
        needs: the stages whose artifacts it reads.
        artifacts: the folders of its artifacts by name, in order.
        status: of one artifact, by name; those of ``needs`` have to be there.
        make: makes what is missing; called in every process.
        check_place: refuses a folder that an artifact is to come to, but that holds what no run made.
    """

    needs: tuple[str, ...]
    artifacts: Callable[[Context], dict[str, Path]]
    status: Callable[[Context, str], Status]
    make: Callable[[Context, Processes], None]
    check_place: Callable[[Context, str], None] | None = None


def _in_first(make: Callable[[Context], None]) -> Callable[[Context, Processes], None]:
    """Work that one process does for all."""
    return lambda context, processes: processes.first_then_all(lambda: make(context))


def _report(context: Context) -> None:
    """Write ``report.html`` and the card of the merged model; does nothing where they are as they would be."""
    from fusekit.report.write import write_report

    capturing.describe(context)
    for line in write_report(context.layout.out):
        context.say(f"report: {line}")


TABLE: dict[str, Stage] = {
    PIVOT: Stage((), capturing.pivot_artifacts, capturing.pivot_status, _in_first(capturing.make_pivot)),
    "data": Stage(
        (), lambda context: {"rows": context.layout.data}, capturing.data_status, _in_first(capturing.make_data)
    ),
    "respond": Stage(
        ("data",), responding.respond_artifacts, responding.respond_status, _in_first(responding.make_responses)
    ),
    "judge": Stage(
        ("data", "respond"),
        responding.judge_artifacts,
        responding.judge_status,
        responding.make_judged,
        responding.check_judged_place,
    ),
    "capture": Stage(
        ("data",),
        capturing.capture_artifacts,
        capturing.capture_status,
        capturing.make_captures,
        lambda context, name: capturing.check_store_place(context.layout.store(name)),
    ),
    "align": Stage(("data",), capturing.align_artifacts, capturing.align_status, capturing.make_alignments),
    "distill": Stage(
        ("data", "judge", "capture", "align"),
        distilling.artifacts,
        distilling.status,
        distilling.make,
        distilling.check_place,
    ),
    "merge": Stage(
        ("data", "distill"), merging.artifacts, merging.status, _in_first(merging.make), merging.check_place
    ),
    "evaluate": Stage(
        ("data", "distill", "merge"), evaluating.artifacts, evaluating.status, _in_first(evaluating.make)
    ),
    # Reads what is there of all others, and says what is not.
    "report": Stage((), lambda _: {}, lambda context, _: Status(context.layout.report), _in_first(_report)),
}
"""The stages by name, in order: those of :data:`STAGES`, and before them the plain checkpoint of a GGUF pivot."""


def chosen_stages(only: str | Collection[str] | None, start: str | None, until: str | None) -> list[str]:
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


def mistakes(
    recipe: Recipe, stages: Collection[str] = STAGES, layout: Layout | None = None, *, files: bool = True
) -> list[Mistake]:
    """What is wrong with a recipe that can be read.

    Args:
        recipe: what is to be done.
        stages: those that are to be done.
        layout: of the run, None where it has no folder yet.
        files: whether models, templates and data are looked for.
    """
    checks: dict[str, Callable[[Recipe], list[Mistake]]] = {
        "capture": partial(capturing.mistakes, layout=layout) if files else lambda _: [],
        "judge": partial(responding.mistakes, layout=layout) if files else lambda _: [],
        "distill": distilling.mistakes,
        "merge": merging.mistakes,
        "evaluate": evaluating.mistakes,
    }
    return [mistake for stage, check in checks.items() if stage in stages for mistake in check(recipe)]


def check_place(context: Context, stage: str, name: str) -> None:
    """Refuse the folder of an artifact, if it holds what no run made: it would be lost.

    Raises StorageError naming the folder, a file in it, and the way out; also for a damaged manifest.
    """
    spec = TABLE[stage]
    if spec.check_place is not None:
        spec.check_place(context, name)
    else:
        artifact.refuse_occupied(spec.artifacts(context)[name])


def require(context: Context, stage: str, *, baseline: bool) -> None:
    """Refuse artifacts of a stage that are missing, not finished, or whose inputs changed. Raises StorageError.

    baseline: whether that of the stage ``distill`` is needed, too.
    """
    for name, folder in TABLE[stage].artifacts(context).items():
        if name == BASELINE and not baseline:
            continue
        status = TABLE[stage].status(context, name)
        if status.state == MISSING:
            raise StorageError(
                f"{folder} is {'out of date' if status.note else 'missing'}: the stage `{stage}` comes first"
            )
        if status.state == BEGUN:
            raise StorageError(f"{folder} is not finished ({status.note}): the stage `{stage}` completes it")
        status.is_done(f"and begin with the stage `{stage}`")
