"""``mergekit-fuse``: ``fusekit run`` with mergekit's own options, beside ``mergekit-yaml`` and the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from huggingface_hub import constants
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from fusekit.cli.fuse_options import options_for_run
from fusekit.cli.merge import drop_noise
from fusekit.cli.recipe import overrides
from fusekit.cli.run import run_recipe
from fusekit.errors import FusekitError
from fusekit.layout import STAGES
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe


@click.command("mergekit-fuse", cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@overrides
@click.option("--only", type=click.Choice(STAGES), help="One stage; what it needs has to be there")
@click.option("--from", "start", type=click.Choice(STAGES), help="The first stage to do; what it needs is checked")
@click.option("--until", type=click.Choice(STAGES), help="The last stage to do")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice")
@add_merge_options
@click.pass_context
def fuse(
    context: click.Context,
    recipe: Path,
    out: Path,
    *,
    overrides: tuple[str, ...],
    only: str | None,
    start: str | None,
    until: str | None,
    ignore_estimates: bool,
    merge_options: MergeOptions,
) -> None:
    """Run the fusion RECIPE in the folder OUT: from sources of any architecture to one merged model.

    The same as fusekit run. The options of mergekit are for the merge: --cuda and
    --device say where it computes; captures and training use the accelerator that is there. --transformers-cache,
    --quiet and -v hold for all stages. --trust-remote-code lets the Python code of every model of the recipe run; for
    one model it is `trust_remote_code: true` in the recipe.
    """
    merge_options.apply_global_options()
    drop_noise()
    options = options_for_run(context, merge_options)
    if merge_options.transformers_cache:
        # Read whenever a model is looked up; data sets have a cache of their own.
        constants.HF_HUB_CACHE = str(Path(merge_options.transformers_cache).expanduser().resolve())
    if merge_options.trust_remote_code:
        overrides = (*overrides, *_trusting(load_recipe(recipe, overrides)))
    run_recipe(
        recipe,
        out,
        overrides,
        only=only,
        start=start,
        until=until,
        ignore_estimates=ignore_estimates,
        quiet=merge_options.quiet,
        merge_options=options,
    )


def _trusting(recipe: Recipe) -> list[str]:
    """Overrides that let every model's code run; says so, whatever else is quiet."""
    names = ", ".join([recipe.pivot.path, *(source.path for source in recipe.sources)])
    click.echo(
        f"warning: --trust-remote-code: Python code that comes with any of these models may run: {names}. To allow it "
        "for one model, set `trust_remote_code: true` there in the recipe",
        err=True,
    )
    places = ["pivot", *(f"sources.{index}" for index in range(len(recipe.sources)))]
    return [f"{place}.trust_remote_code=true" for place in places]


def main() -> None:
    """Entry point of the `mergekit-fuse` script: a FusekitError becomes one message and exit status 1."""
    try:
        fuse()
    except FusekitError as error:
        click.echo(f"mergekit-fuse: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
