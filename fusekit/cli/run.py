"""`fusekit run`, and the commands on its output: `report`, `clean` and `verify`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from fusekit import artifacts as artifact
from fusekit.cli.common import command_again, drop_noise, interruptible, print_json
from fusekit.cli.recipe import overrides, recipe_argument
from fusekit.disk import counted, human, output_lock
from fusekit.errors import FusekitError, StorageError
from fusekit.layout import STAGES
from fusekit.recipe.loading import load_recipe
from fusekit.yaml import Document

Command = TypeVar("Command", bound=Callable[..., Any])


def run_options(command: Command) -> Command:
    """RECIPE, OUT and the options of the commands that run a recipe, as arguments of :func:`run_recipe`."""
    for option in (
        click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice."),
        click.option("--until", type=click.Choice(STAGES), help="End with this stage."),
        click.option("--from", "start", type=click.Choice(STAGES), help="Begin with this stage; checks what it needs."),
        click.option("--only", type=click.Choice(STAGES), help="Do one stage; what it needs has to be there."),
        overrides,
        click.argument("out", type=click.Path(path_type=Path)),
        recipe_argument,
    ):
        command = option(command)
    return command


@click.command()
@run_options
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print all estimates, not only those that are tight.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON: folders, scores, seconds.")
def run(recipe: Path, out: Path, *, verbose: bool, **how: Any) -> None:
    """Do what is missing of a fusion RECIPE in the folder OUT: from sources to a merged, evaluated model.

    Every stage leaves an artifact and does nothing where that is there already, so a run that was stopped resumes when
    the same command is given again. Where the inputs of an artifact have changed, it stops and says which.
    """
    if verbose:
        logging.getLogger("fusekit").setLevel(logging.INFO)
    run_recipe(recipe, out, **how)


def run_recipe(
    recipe: Path | Document, out: Path, *, overrides: tuple[str, ...], quiet: bool, as_json: bool = False, **how: Any
) -> None:
    """Run stages of a recipe for a command; Ctrl-C and SIGTERM exit with their status and the command that resumes.

    how: further arguments of :func:`fusekit.pipeline.run.run`.
    """
    from fusekit.evaluation.table import table
    from fusekit.pipeline.run import run as go
    from fusekit.report.text import seconds

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    def stopped() -> None:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"fusekit: stopped; what is whole in {out} stays. To resume:\n  {command_again()}", err=True)

    drop_noise()
    with interruptible(stopped):
        done = go(recipe, out, overrides, say=say, quiet=quiet, **how)
    if as_json:
        found = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(done).items()}
        print_json(found | {"targets": [str(path) for path in done.targets]})
    elif not quiet:
        if done.results is not None:
            click.echo(table(done.results))
        where = f"the merged model is in {done.merged}" if done.merged else f"what it made is in {done.out}"
        click.echo(f"done in {seconds(done.seconds)}: {where}")


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keep what this recipe needs; by default the recipe that made OUT, and that of a run which is not finished.",
)
@overrides
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(STAGES), help="Remove what this stage made (repeatable)."
)
@click.option("--from", "first", type=click.Choice(STAGES), help="Remove what this stage and all after it made.")
@click.option("--yes", is_flag=True, help="Remove it.")
def clean(
    out: Path, *, recipe: Path | None, overrides: tuple[str, ...], stages: tuple[str, ...], first: str | None, yes: bool
) -> None:
    """Show what the run in OUT no longer needs, and how much it takes; with --yes, remove it.

    That is what the recipe does not name any more (stores, alignments, models and scores of a source that was taken
    out), checkpoints of trainings that are finished, and what processes that died left behind. With --stage or --from
    it is what these stages made, so that the next run makes it again. Nothing that is not of the run is touched.
    """
    from fusekit.pipeline import clean as cleaning
    from fusekit.pipeline.run import write_log

    if (stages or first) and recipe:
        raise click.UsageError("--recipe says what is needed, --stage and --from what to make again: give one of both")
    if overrides and not recipe:
        raise click.UsageError("--set changes a value of --recipe: give both")
    with cleaning.claimed(out) as layout:
        if stages or first:
            chosen = {*stages, *(STAGES[STAGES.index(first) :] if first else ())}
            found = cleaning.made_by(layout, [stage for stage in STAGES if stage in chosen])
        else:
            found = cleaning.unneeded(layout, load_recipe(recipe, overrides) if recipe else None)
        for item in found.items:
            click.echo(f"{item.path}  {human(item.nbytes)}  {item.why}")
        for line in found.spared:
            click.echo(f"spared: {line}", err=True)
        total = f"{counted(len(found.items), 'thing')}, {human(found.nbytes)}"
        if not found.items:
            click.echo("nothing to remove")
        elif yes:
            cleaning.remove(found.items)
            write_log(layout.logs, "clean: removed " + ", ".join(str(item.path) for item in found.items))
            click.echo(f"removed {total}")
        else:
            click.echo(f"{total}; nothing was removed: --yes does it")


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--no-card", is_flag=True, help="Leave the card of the merged model as it is.")
@click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
def report(out: Path, *, no_card: bool = False, quiet: bool = False) -> None:
    """Write report.html of the run in the folder OUT, and the model card (README.md) of its merged model.

    OUT may be unfinished: the report says what is missing. While a run is writing OUT, the report shows what is there
    so far and the card is not changed.
    """
    from fusekit.report.card import write_report
    from fusekit.report.facts import Facts

    out = out.resolve()
    Facts(out)  # refuses any other folder before it is locked
    with ExitStack() as held:
        try:
            held.enter_context(output_lock(out))
        except StorageError as error:
            click.echo(
                f"fusekit: {str(error).rstrip('.')}. The report shows what is there so far; the card is not changed.",
                err=True,
            )
            no_card = True
        for line in write_report(out, with_card=not no_card):
            if not quiet or line.startswith("warning"):
                click.echo(line, err=line.startswith("warning"))
    if not quiet:
        click.echo(f"report: {out / 'report.html'}")


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print problems only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: problems by the folder of each artifact.")
def verify(paths: tuple[Path, ...], quiet: bool, as_json: bool) -> None:
    """Read every artifact under PATHS and compare it with what was committed: stores, the stages of a run and the
    checkpoints of a training.

    The result of `fusekit merge` alone has nothing to compare it with.

    Each problem is printed with its file. The exit status is 1 if there is a problem, or nothing to verify.
    """
    found: dict[str, list[str]] = {}
    for folder in (folder for path in paths for folder in _artifacts(path)):
        try:
            wrong, good = _checked(folder)
        except (FusekitError, OSError) as error:
            wrong = [line if line.startswith(str(folder)) else f"{folder}: {line}" for line in str(error).splitlines()]
            good = ""
        if not (folder / artifact.MANIFEST).exists():
            continue  # a training deleted its checkpoint meanwhile
        found[str(folder)] = wrong
        for line in [] if as_json else wrong or ([] if quiet else [good]):
            click.echo(line)
    problems = sum(map(len, found.values()))
    if as_json:
        print_json(found)
    elif problems:
        click.echo(
            f"fusekit: {counted(problems, 'problem')} in {counted(len(found), 'artifact')}: restore what is named, or "
            "remove the artifact and run the command that made it again",
            err=True,
        )
    elif not found:
        where = ", ".join(map(str, paths))
        click.echo(
            f"fusekit: nothing under {where} has a {artifact.MANIFEST}, which stores, the stages of a run and "
            "checkpoints have: nothing to compare with. What `fusekit merge` writes is checked before it is published",
            err=True,
        )
    if problems or not found:
        click.get_current_context().exit(1)


def _artifacts(path: Path) -> Iterator[Path]:
    """The folders with a manifest at or below a path, in order."""
    for name, below, files in os.walk(path):
        below.sort()
        if artifact.MANIFEST in files:
            yield Path(name)


def _checked(folder: Path) -> tuple[list[str], str]:
    """What is wrong with an artifact, one line each, and what it is if nothing is. Raises FusekitError, OSError."""
    known = artifact.read(folder)
    if known is None or known.stage == "capture":
        from fusekit.capturing.store import Store

        store = Store.open(folder)
        held = f"{counted(len(store), 'example')} in {counted(len(store.records), 'shard')}"
        return store.verify(), f"{folder}: {held}, all as committed"
    held = f"{counted(len(known.files), 'file')} of the stage {known.stage!r}"
    return artifact.problems(folder), f"{folder}: {held}, all as committed"
