"""``fusekit run``: parse, call, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click

from fusekit.cli.recipe import overrides, recipe_argument
from fusekit.cli.stopping import TerminatedError, command_again, sigterm_unwinds, status_of
from fusekit.layout import STAGES


@click.command()
@recipe_argument
@click.argument("out", type=click.Path(path_type=Path))
@overrides
@click.option("--only", type=click.Choice(STAGES), help="Do one stage; what it needs has to be there.")
@click.option("--from", "start", type=click.Choice(STAGES), help="Begin with this stage; what it needs is checked.")
@click.option("--until", type=click.Choice(STAGES), help="End with this stage.")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def run(
    recipe: Path,
    out: Path,
    *,
    overrides: tuple[str, ...] = (),
    only: str | None = None,
    start: str | None = None,
    until: str | None = None,
    ignore_estimates: bool = False,
    quiet: bool = False,
) -> None:
    """Do what is missing of a fusion RECIPE in the folder OUT: from sources to a merged, evaluated model.

    Every stage leaves an artifact and does nothing where that is there already, so a run that was stopped resumes when
    the same command is given again. Where the inputs of an artifact have changed, it stops and says which.
    """
    run_recipe(
        recipe, out, overrides, only=only, start=start, until=until, ignore_estimates=ignore_estimates, quiet=quiet
    )


def run_recipe(
    recipe: Path,
    out: Path,
    overrides: tuple[str, ...] = (),
    *,
    only: str | Collection[str] | None = None,
    start: str | None = None,
    until: str | None = None,
    ignore_estimates: bool = False,
    quiet: bool = False,
    merge_options: Mapping[str, Any] | None = None,
) -> None:
    """Run stages of a recipe for a command; Ctrl-C and SIGTERM exit with their status and the command that resumes."""
    from fusekit.cli.capture import drop_noise
    from fusekit.devices import OtherProcessError
    from fusekit.evaluation.table import table
    from fusekit.pipeline.run import run as go

    drop_noise()
    try:
        with sigterm_unwinds():
            done = go(
                recipe,
                out,
                overrides,
                only=only,
                start=start,
                until=until,
                ignore_estimates=ignore_estimates,
                say=lambda line: None if quiet else click.echo(line, err=True),
                quiet=quiet,
                merge_options=merge_options,
            )
    except (KeyboardInterrupt, TerminatedError) as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"fusekit: stopped; what is whole in {out} stays. To resume:\n  {command_again()}", err=True)
        sys.exit(status_of(error))
    except OtherProcessError:
        sys.exit(1)  # process 0 has said why
    if done.results is not None and not quiet:
        click.echo(table(done.results))
