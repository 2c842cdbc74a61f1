"""``fusekit run``: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from fusekit.cli.recipe import overrides
from fusekit.cli.stopping import TerminatedError, sigterm_unwinds, status_of

STAGES = ("data", "represent", "align", "distill", "merge", "evaluate", "report")


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@overrides
@click.option("--only", type=click.Choice(STAGES), help="One stage; what it needs has to be there.")
@click.option("--until", type=click.Choice(STAGES), help="The last stage to do.")
@click.option("--quiet", is_flag=True, help="Errors only.")
def run(
    recipe: Path,
    out: Path,
    *,
    overrides: tuple[str, ...] = (),
    only: str | None = None,
    until: str | None = None,
    quiet: bool = False,
) -> None:
    """Do what is missing of a fusion RECIPE in the folder OUT: from sources to a merged, evaluated model.

    Every stage leaves an artifact and does nothing where that is there already, so a run that was stopped goes on when
    the same command is given again. What an artifact was made from must not change under it: fusekit says what did.
    """
    from fusekit.errors import RecipeError
    from fusekit.evaluation.table import table_of
    from fusekit.pipeline.run import run as go
    from fusekit.recipe import load_recipe
    from fusekit.representation.processes import OtherProcessError

    if only and until:
        raise RecipeError("--only is one stage and --until several: give one of them")
    loaded = load_recipe(recipe, overrides)
    _drop_noise()
    try:
        with sigterm_unwinds():
            done = go(
                loaded,
                out,
                only=only,
                until=until,
                say=lambda line: None if quiet else click.echo(line, err=True),
                quiet=quiet,
            )
    except (KeyboardInterrupt, TerminatedError) as error:
        again = shlex.join(["fusekit", *sys.argv[1:]])
        click.echo(f"fusekit: stopped; what is whole in {out} stays. To go on:\n  {again}", err=True)
        sys.exit(status_of(error))
    except OtherProcessError:
        sys.exit(1)  # process 0 has said why
    if done.results is not None and not quiet:
        click.echo(table_of(done.results))


def _drop_noise() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
