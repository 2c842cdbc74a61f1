"""``fusekit run``: parse, call, print."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from fusekit.cli.common import command_again, drop_noise, interruptible, print_json
from fusekit.cli.recipe import overrides, recipe_argument
from fusekit.layout import STAGES
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
