"""``mergekit-fuse``: ``fusekit run`` with mergekit's own options for the merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from huggingface_hub import constants
from mergekit.options import MergeOptions, PrettyPrintHelp

from fusekit import yaml as safe_yaml
from fusekit.cli.merge import drop_warning, merge_options
from fusekit.cli.run import run_options, run_recipe
from fusekit.errors import FusekitError, RecipeError
from fusekit.merging.run import check_options
from fusekit.recipe import Recipe, load_recipe

REFUSED = {"lora_merge_cache", "lora_merge_dtype", "lazy_unpickle", "unsafe_truncate_embeddings", "allow_crimes"}
"""Options of mergekit that have no meaning for a run, whose models are whole, safetensors and alike."""

OF_THE_RUN = ("quiet", "verbosity", "trust_remote_code", "transformers_cache")
"""Options for every stage, not only the merge."""


@click.command("mergekit-fuse", cls=PrettyPrintHelp)
@run_options
@merge_options
@click.pass_context
def fuse(
    context: click.Context,
    /,
    recipe: Path,
    out: Path,
    *,
    overrides: tuple[str, ...],
    merge_options: MergeOptions,
    **how: Any,
) -> None:
    """Run the fusion RECIPE in the folder OUT: from sources of any architecture to one merged model.

    This is fusekit run with mergekit's options, which are for the merge: --cuda and --device say where it computes;
    captures and training use the accelerator that is there. --transformers-cache, --quiet and -v hold for all stages.
    --trust-remote-code lets the Python code of every model of the recipe run; for one model, set
    `trust_remote_code: true` in the recipe.
    """
    merge_options.apply_global_options()
    drop_warning()
    options = _options_for_run(context, merge_options)
    if merge_options.transformers_cache:
        # Read whenever a model is looked up; data sets have a cache of their own.
        constants.HF_HUB_CACHE = str(Path(merge_options.transformers_cache).expanduser().resolve())
    document = safe_yaml.load(recipe)  # once: it may be a pipe
    if merge_options.trust_remote_code:
        overrides = (*overrides, *_trusting(load_recipe(document, overrides)))
    run_recipe(document, out, overrides=overrides, quiet=merge_options.quiet, merge_options=options, **how)


def _options_for_run(context: click.Context, options: MergeOptions) -> dict[str, Any]:
    """The options of mergekit that were given, for the stage ``merge`` of a run.

    Raises RecipeError for one that has no meaning there, MergeError for a device that this machine lacks.
    """
    given = {
        name
        for name in MergeOptions.model_fields
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    }
    if refused := sorted(given & REFUSED):
        raise RecipeError(
            f"--{refused[0].replace('_', '-')} means nothing for a fusion recipe: its distilled models are whole, in "
            "safetensors, and of the pivot's architecture and vocabulary; leave it out"
        )
    check_options(options)
    if given & {"gpu_rich", "cuda"}:
        given |= {"device"}
    return {name: getattr(options, name) for name in sorted(given.difference(OF_THE_RUN))}


def _trusting(recipe: Recipe) -> list[str]:
    """Overrides that let every model's code run; says so, whatever else is quiet."""
    names = ", ".join(model.path for model in recipe.models.values())
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
