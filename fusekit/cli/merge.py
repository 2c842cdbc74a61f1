"""``fusekit merge``: parse, call, print."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from fusekit.cli.stopping import TerminatedError, sigterm_unwinds, status_of
from fusekit.errors import FusekitError, RecipeError
from fusekit.merging.run import Settings
from fusekit.merging.run import merge as run
from fusekit.recipe.loading import kind_of


@click.command("merge", cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace the model at OUT, in one step, once the new one is complete")
@click.option("--ignore-estimates", is_flag=True, help="Start even if disk or memory seem too small")
@click.option(
    "--allow-pickle",
    multiple=True,
    metavar="MODEL",
    help="Read pickled weights of this model (repeatable)",
)
@click.option(
    "--allow-remote-code",
    multiple=True,
    metavar="MODEL",
    help="Run Python code of this model (repeatable)",
)
@add_merge_options
def merge(
    *,
    recipe: str,
    out: str,
    overwrite: bool,
    ignore_estimates: bool,
    allow_pickle: tuple[str, ...],
    allow_remote_code: tuple[str, ...],
    merge_options: MergeOptions,
) -> None:
    """Merge the models of a mergekit RECIPE into the folder OUT.

    The recipe, its models, disk and memory are checked before anything is read, the result before it is published;
    OUT appears in one step, whole, or not at all. A fusion recipe is for fusekit run or mergekit-fuse.
    """
    merge_options.apply_global_options()
    drop_noise()
    if kind_of(recipe) == "fusion":
        raise RecipeError(
            f"{recipe} is a fusion recipe: `mergekit-fuse {recipe} {out} --only merge` merges the targets of its run, "
            "with the same options; `fusekit run` does all of it"
        )
    quiet = merge_options.quiet

    def say(line: str) -> None:
        if not quiet or line.startswith("warning"):
            click.echo(line, err=True)

    published: list[bool] = []
    settings = Settings(
        overwrite=overwrite,
        ignore_estimates=ignore_estimates,
        allow_pickle=frozenset(allow_pickle),
        allow_remote_code=frozenset(allow_remote_code),
        say=say,
        on_published=lambda: published.append(True),
    )
    try:
        with sigterm_unwinds():
            merged: Any = run(recipe, out, merge_options, settings)
    except (KeyboardInterrupt, TerminatedError) as error:
        _stopped(out, status_of(error), bool(published))
    except FusekitError:
        logging.info("the merge failed", exc_info=True)
        raise
    if not quiet:
        click.echo(str(merged))


def drop_noise() -> None:
    """mergekit sets a config field by its former name, about which transformers warns: nothing a user could change."""
    deprecation = "`torch_dtype` is deprecated"
    logging.getLogger("transformers.configuration_utils").addFilter(
        lambda record: deprecation not in record.getMessage()
    )


def _stopped(out: str, status: int, published: bool) -> None:
    if published:
        message = f"stopped while tidying up; the merged model is published to {out}, whole."
    else:
        message = f"stopped; nothing was published to {out}. Run the same command to start again."
    click.echo(f"fusekit: {message}", err=True)
    sys.exit(status)
