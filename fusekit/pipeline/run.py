"""``fusekit run``: the stages of a recipe in order, each only where something is missing."""

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
from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file, disk_fault, output_lock, remove
from fusekit.devices import Processes
from fusekit.errors import StorageError
from fusekit.layout import NAMES, PIVOT, STAGES, Layout
from fusekit.pipeline.context import Context, Readers
from fusekit.pipeline.stages import TABLE, check_place, chosen_stages, mistakes, require
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe
from fusekit.yaml import Document

_DECIDE = {"data", "distill", "merge"}
"""Stages that tell, done or checked, that what is there is of the recipe."""


@dataclass(frozen=True)
class Run:
    """What a run made.

    Attributes:
        out: the folder.
        targets: of the distillation.
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
    started, chosen = time.monotonic(), chosen_stages(only, start, until)
    layout, processes = layout_of(out), Processes.current()
    check = partial(mistakes, stages=chosen, layout=layout)
    # Before the output is touched: a recipe that cannot be done leaves nothing behind.
    if not isinstance(recipe, Recipe):
        recipe = processes.first_then_all(partial(load_recipe, recipe, overrides, check))
    else:
        processes.first_then_all(lambda: recipe.refuse(check(recipe)))
    log = RunLog(layout.logs)

    heading: list[str] = []

    def tell(line: str) -> None:
        if processes.is_first:
            for text in (*heading, line):
                log.write(text)
                say(text)
            heading.clear()

    readers = Readers(recipe, layout)
    context = Context(recipe, layout, readers, tell, quiet, dict(merge_options or {}), ignore_estimates)
    needed = {need for name in chosen for need in TABLE[name].needs}
    decided = {*chosen, *needed} >= _DECIDE
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(output_lock(layout.out))
            _claim(context, chosen)
            held.enter_context(log.around())

        processes.first_then_all(claim)
        if chosen != ["report"]:
            TABLE[PIVOT].make(context, processes)
        for name in STAGES:
            if name == "report" and name in chosen:
                processes.first_then_all(partial(_save if decided else _refuse_other_recipe, layout, recipe))
            if name in chosen:
                if len(chosen) > 1:  # and if it has anything to say
                    heading[:] = [f"stage {chosen.index(name) + 1} of {len(chosen)}: {name}"]
                TABLE[name].make(context, processes)
            elif name in needed:
                processes.first_then_all(partial(require, context, name, baseline="evaluate" in chosen))
        if decided:
            processes.first_then_all(partial(_save, layout, recipe))
    results = None
    if "evaluate" in chosen and recipe.evaluate is not None:
        results = json.loads(layout.results.read_text(encoding="utf-8"))
    targets = context.targets if {"distill", "merge", "evaluate"} & set(chosen) else []
    merged = layout.merged if targets and recipe.merge is not None and layout.merged.is_dir() else None
    return Run(layout.out, targets, merged, results, time.monotonic() - started)


def layout_of(out: Path | str) -> Layout:
    """The layout of an output that need not exist. Raises StorageError for a path that cannot be a folder."""
    try:
        path = Path(out).resolve()
        if path.exists() and not path.is_dir():
            raise StorageError(f"{out} is a file or a device, not a folder: choose another output")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{out} cannot be an output: {reason}; choose another one") from error
    return Layout(path)


def _claim(context: Context, chosen: list[str]) -> None:
    """Refuse a folder that holds something else; save the recipe of the first run."""
    layout, recipe = context.layout, context.recipe
    layout.out.mkdir(parents=True, exist_ok=True)
    if foreign := foreign_to_runs(layout):
        raise StorageError(foreign)
    for stage in (PIVOT, *chosen):
        for name in TABLE[stage].artifacts(context):
            check_place(context, stage, name)
    if not layout.recipe.exists():  # a later one that is refused shall not be said to have made what is there
        _save(layout, recipe)
    elif layout.recipe.read_bytes() != _text(recipe):
        layout.logs.mkdir(exist_ok=True)
        commit_file(layout.begun, lambda file: file.write(_text(recipe)))


def _refuse_other_recipe(layout: Layout, recipe: Recipe) -> None:
    """Let the report be of the recipe that made what is there. Raises StorageError for another one."""
    before = load_recipe(layout.recipe)
    if changed := artifact.differences(before.model_dump(mode="json"), recipe.model_dump(mode="json")):
        raise StorageError(
            f"{layout.out} was made by another recipe, so it cannot be reported with this one:\n  "
            + "\n  ".join(changed)
            + f"\nRun the other stages first, or make the report of what is there: fusekit report {layout.out}"
        )


def foreign_to_runs(layout: Layout) -> str | None:
    """Why a folder that exists is not the output of a run, None where it is one or empty. Raises OSError.

    Files of a run are there only beside its recipe; folders with names of a run's are examined by the stages.
    """
    if layout.recipe.exists():
        return None
    there = sorted(path for path in layout.out.iterdir() if not path.name.startswith("."))
    foreign = [path.name for path in there if path.name not in NAMES or path.is_file()]
    if not foreign:
        return None
    return f"{layout.out} is not the output of a run, but holds {foreign[0]!r}: choose another folder, or empty it"


def _save(layout: Layout, recipe: Recipe) -> None:
    """Save the recipe with every value written out: by now it is that of what is there."""
    commit_file(layout.recipe, lambda file: file.write(_text(recipe)))
    remove(layout.begun)


def _text(recipe: Recipe) -> bytes:
    head = "# The recipe of this run, every value written out: fusekit run recipe.resolved.yml OUT repeats it.\n"
    return (head + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)).encode()


class RunLog:
    """``run.log`` in a folder: what runs of an output said, with times; for people, not an artifact.

    A line is written at once, so that a run that dies leaves all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.log"

    def write(self, text: str) -> None:
        """Add a text, each of its lines under the same time. Raises StorageError when the disk fails."""
        now = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        lines = "".join(f"{now} {line}\n" for line in text.splitlines() or [""])
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(lines)
        except OSError as error:
            raise disk_fault(error, self.path) or StorageError(f"{self.path}: cannot be written: {error}") from error

    @contextmanager
    def around(self) -> Iterator[None]:
        """Write who runs what before the body, and how it ended after it."""
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.write(f"fusekit {fusekit.__version__}, process {os.getpid()} on {socket.gethostname()}: {command}")
        try:
            yield
        except BaseException as error:
            with suppress(StorageError):  # a disk that is full shall not hide what stopped the run
                self.write(f"stopped by {type(error).__name__}: {error}".rstrip(": "))
            raise
        self.write("done")
