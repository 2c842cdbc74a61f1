"""``fusekit run`` and ``plan``: the stages of a recipe in order, each only where something is missing."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import fusekit
from fusekit.devices import Processes
from fusekit.disk import commit_file, disk_errors, output_lock, refuse_file, remove
from fusekit.errors import RecipeError, StorageError
from fusekit.layout import BASELINE, NAMES, PIVOT, STAGES, Layout
from fusekit.pipeline import capturing, distilling, evaluating, merging, responding
from fusekit.pipeline.plan import Plan, Planner
from fusekit.pipeline.stage import BEGUN, MISSING, NOWHERE, Context, Stage
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe
from fusekit.yaml import Document, Mistake, nearest, together


class Report(Stage):
    """``report.html`` and the card of the merged model."""

    name = "report"
    places = ("report.html", "models.json")

    def artifacts(self, _context: Context) -> dict[str, Path]:
        return {}

    def make(self, context: Context) -> None:
        from fusekit.report.card import write_report

        capturing.describe(context)
        for line in write_report(context.layout.out):
            context.say(f"report: {line}")


_STAGES: tuple[Stage, ...] = (
    capturing.DequantisedPivot(),
    capturing.Data(),
    responding.Respond(),
    responding.Judging(),
    capturing.Capture(),
    distilling.Align(),
    distilling.Distill(),
    merging.Merge(),
    evaluating.Evaluate(),
    Report(),
)
TABLE: dict[str, Stage] = {stage.name: stage for stage in _STAGES}
"""The stages by name, in order: those of :data:`STAGES`, and before them the plain checkpoint of a GGUF pivot."""

_DECIDE = {"data", "distill", "merge"}
"""Stages after which, done or checked, the artifacts are known to be of the recipe."""


def chosen_stages(only: str | Collection[str] | None, start: str | None, until: str | None) -> list[str]:
    """The stages to do, in order. Raises RecipeError for an unknown one, and for requests that leave none or clash."""
    alone = [only] if isinstance(only, str) else list(only or ())
    for stage in (*alone, start, until):
        if stage is not None and stage not in STAGES:
            raise RecipeError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    if alone and (start or until):
        raise RecipeError("--only is one stage, --from and --until bound several: give one or the other")
    if alone:
        return [stage for stage in STAGES if stage in alone]
    first, last = STAGES.index(start or STAGES[0]), STAGES.index(until or STAGES[-1])
    if first > last:
        raise RecipeError(f"--from {start} comes after --until {until}: nothing is left to do between them")
    return list(STAGES[first : last + 1])


def mistakes(recipe: Recipe, stages: Collection[str] = STAGES, layout: Layout | None = None) -> list[Mistake]:
    """What is wrong with a recipe that can be read. layout: of the run, None where it has no folder yet."""
    return [mistake for name in TABLE if name in stages for mistake in TABLE[name].mistakes(recipe, layout)]


def _refuse(found: Sequence[Mistake]) -> None:
    if found:
        raise RecipeError(together("recipe", [f"{'.'.join(map(str, m.paths[0]))}: {m.says}" for m in found]))


def _require(context: Context, stage: str, *, baseline: bool) -> None:
    """Refuse artifacts of a stage that are missing, not finished, or whose inputs changed. Raises StorageError."""
    for name, folder in TABLE[stage].artifacts(context).items():
        if name == BASELINE and not baseline:
            continue
        status = TABLE[stage].status(context, name)
        if status.state == MISSING:
            what = "out of date" if status.note else "missing"
            raise StorageError(f"{folder} is {what}: the stage `{stage}` comes first")
        if status.state == BEGUN:
            raise StorageError(f"{folder} is not finished ({status.note}): the stage `{stage}` completes it")
        status.is_done(f"remove {status.folder} and begin with the stage `{stage}`")


@dataclass(frozen=True)
class Run:
    """What a run made.

    Attributes:
        out: the folder.
        targets: the distilled models.
        merged: the merged model, None where the recipe or the stages have none.
        results: scores by model, None without.
        seconds: how long it took.
    """

    out: Path
    targets: list[Path]
    merged: Path | None
    results: dict[str, Any] | None
    seconds: float


def run(
    recipe: Recipe | Document | Path | str,
    out: Path | str,
    overrides: Sequence[str] = (),
    *,
    only: str | Collection[str] | None = None,
    start: str | None = None,
    until: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    merge_options: Mapping[str, Any] | None = None,
    ignore_estimates: bool = False,
) -> Run:
    """Do what is missing of a recipe, and nothing else.

    A run that was stopped, at any moment, resumes when it is started again. Under ``accelerate launch`` or ``torchrun``
    every process calls this: captures and training are shared, the rest is done by the first.

    Args:
        recipe: what to do, or the file that says it, or what was read from one.
        out: folder of the run; its artifacts are those of :class:`Layout`.
        overrides: of a file, as for :func:`load_recipe`.
        only: a stage, or several; what they need of the others has to be there, and is checked.
        start: the first stage to do; what later ones need of those before it has to be there, and is checked.
        until: the last stage to do.
        say: gets a line of plain text for the user.
        quiet: no progress of captures.
        merge_options: fields of mergekit's MergeOptions, for the stage ``merge``.
        ignore_estimates: start stages although disk or memory do not seem to suffice.

    Raises:
        FusekitError: what each stage raises; an output in use, or that holds something else; inputs of an artifact that
            changed (with both values).
    """
    started, chosen, layout = time.monotonic(), chosen_stages(only, start, until), layout_of(out)
    processes = Processes.current()
    in_first, check = processes.first_then_all, partial(mistakes, stages=chosen, layout=layout)
    # Before the output is touched: a recipe that cannot be done leaves nothing behind.
    if not isinstance(recipe, Recipe):
        recipe = in_first(partial(load_recipe, recipe, overrides, check))
    else:
        in_first(lambda: _refuse(check(recipe)))

    heading: list[str] = []  # of a stage that has not said anything yet

    def tell(line: str) -> None:
        if processes.is_first:
            for text in (*heading, line):
                write_log(layout.logs, text)
                say(text)
            heading.clear()

    context = Context(recipe, layout, tell, quiet, merge_options or {}, ignore_estimates)
    needed = {need for name in chosen for need in TABLE[name].needs}
    decided = {*chosen, *needed} >= _DECIDE
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(output_lock(layout.out))
            _claim(context, chosen)
            held.enter_context(logged(layout.logs))

        in_first(claim)
        if chosen != ["report"]:
            in_first(partial(TABLE[PIVOT].make, context))
        for name in STAGES:
            stage = TABLE[name]
            if name in chosen:
                if len(chosen) > 1:
                    heading[:] = [f"stage {chosen.index(name) + 1} of {len(chosen)}: {name}"]
                if stage.shared:
                    stage.make(context)
                else:
                    in_first(partial(stage.make, context))
            elif name in needed:
                in_first(partial(_require, context, name, baseline="evaluate" in chosen))
            if name == "merge" and decided:
                in_first(partial(_save, layout, recipe))
    results = None
    if "evaluate" in chosen and recipe.evaluate is not None:
        results = json.loads(layout.results.read_text(encoding="utf-8"))
    targets = context.targets if {"distill", "merge", "evaluate"} & set(chosen) else []
    merged = layout.merged if targets and recipe.merge is not None and layout.merged.is_dir() else None
    return Run(layout.out, targets, merged, results, time.monotonic() - started)


def make_plan(recipe: Recipe, name: str, out: Path | None = None) -> Plan:
    """Say what ``fusekit run`` would do. Writes nothing. out: the output to compare with, which need not exist."""
    layout = layout_of(out) if out is not None else NOWHERE
    if layout.out.is_dir():
        refuse_other_output(layout)
    planner = Planner(Context(recipe, layout), Plan(name, str(out) if out is not None else None))
    planner.find_models()
    for stage in TABLE.values():
        stage.plan(planner)
    planner.sum_up()
    return planner.plan


def layout_of(out: Path | str) -> Layout:
    """The layout of an output that need not exist. Raises StorageError for a path that cannot be a folder."""
    path = Path(os.path.realpath(out))  # Path.resolve raises for links in a circle
    refuse_file(path)
    return Layout(path)


def _claim(context: Context, chosen: list[str]) -> None:
    """Refuse a folder that holds something else; save the recipe of the first run."""
    layout, recipe = context.layout, context.recipe
    layout.out.mkdir(parents=True, exist_ok=True)
    refuse_other_output(layout)
    for stage in (PIVOT, *chosen):
        for name in TABLE[stage].artifacts(context):
            TABLE[stage].check_place(context, name)
    if not layout.recipe.exists():  # a later recipe that is refused did not make what is there
        _save(layout, recipe)
    elif layout.recipe.read_bytes() != _text(recipe):
        layout.logs.mkdir(exist_ok=True)
        commit_file(layout.begun, _text(recipe))


def refuse_other_output(layout: Layout) -> None:
    """Refuse a folder that is neither the output of a run nor empty. Raises StorageError.

    Files of a run are there only beside its recipe; folders with names of a run's are examined by the stages.
    """
    if layout.recipe.exists():
        return
    try:
        there = sorted(path for path in layout.out.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise StorageError(f"{layout.out} cannot be read: {error.strerror or error}") from error
    if foreign := [path.name for path in there if path.name not in NAMES or path.is_file()]:
        raise StorageError(
            f"{layout.out} is not the output of a run, but holds {foreign[0]!r}: choose another folder, or empty it"
        )


def _save(layout: Layout, recipe: Recipe) -> None:
    """Save the recipe with every value written out, now that the artifacts are of it."""
    commit_file(layout.recipe, _text(recipe))
    remove(layout.begun)


def _text(recipe: Recipe) -> bytes:
    head = "# The recipe of this run, every value written out: fusekit run recipe.resolved.yml OUT repeats it.\n"
    return (head + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)).encode()


def write_log(folder: Path, text: str) -> None:
    """Add a text to ``run.log``, each of its lines under the time. Raises StorageError when the disk fails."""
    now = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    with disk_errors(folder / "run.log"):
        folder.mkdir(exist_ok=True)
        with (folder / "run.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{now} {line}\n" for line in text.splitlines() or [""])


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Write to the log what is run, and by which process, before the body; after it, how it ended."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_log(folder, f"fusekit {fusekit.__version__}, process {os.getpid()} on {socket.gethostname()}: {command}")
    try:
        yield
    except BaseException as error:
        with suppress(StorageError):  # a full disk must not hide what stopped the run
            write_log(folder, f"stopped by {type(error).__name__}: {error}".rstrip(": "))
        raise
    write_log(folder, "done")
