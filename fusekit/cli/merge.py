"""``fusekit merge``: parse, call, print."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, ShardSizeParamType, add_merge_options

from fusekit import yaml as safe_yaml
from fusekit.cli.common import interruptible, show
from fusekit.errors import FusekitError, RecipeError
from fusekit.merging.models import Settings
from fusekit.merging.run import check as run_check
from fusekit.merging.run import check_options
from fusekit.merging.run import merge as run
from fusekit.recipe.loading import kind_of

Command = TypeVar("Command", bound=Callable[..., Any])


class _ShardSize(ShardSizeParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            size = super().convert(value, param, ctx)
        except ValueError:
            size = -1
        return size if size >= 0 else self.fail(f"{value!r} is not a size, such as 500M or 5B", param, ctx)


def merge_options(command: Command) -> Command:
    """mergekit's own options, with an error in place of a traceback for numbers that mean nothing."""
    command = add_merge_options(command)
    types = {"out_shard_size": _ShardSize(), "num_threads": click.IntRange(1), "write_threads": click.IntRange(1)}
    for option in command.__click_params__:  # type: ignore[attr-defined]
        option.type = types.get(option.name, option.type)
    return command


@click.command("merge", cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@click.option("--check", is_flag=True, help="Print what would be done and every problem; write nothing")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (sizes in bytes)")
@click.option("--overwrite", is_flag=True, help="Replace the model at OUT, in one step, once the new one is complete")
@click.option("--ignore-estimates", is_flag=True, help="Start even if disk or memory seem too small")
@click.option("--allow-pickle", multiple=True, metavar="MODEL", help="Read pickled weights of this model (repeatable)")
@click.option("--allow-remote-code", multiple=True, metavar="MODEL", help="Run Python code of this model (repeatable)")
@merge_options
def merge(recipe: str, out: str | None, *, check: bool, as_json: bool, merge_options: MergeOptions, **how: Any) -> None:
    """Merge the models of a mergekit RECIPE into the folder OUT.

    The recipe, its models, disk and memory are checked before anything is read, the result before it is published;
    OUT appears in one step, whole, or not at all. A fusion recipe is for fusekit run or mergekit-fuse.
    """
    drop_warning()
    document = safe_yaml.load(recipe)  # once: it may be a pipe
    if kind_of(document) == "fusion":
        raise RecipeError(
            f"{recipe} is a fusion recipe: `mergekit-fuse {recipe} {out or 'OUT'} --only merge` merges the distilled "
            "models of its run, with the same options; `fusekit run` does all of it"
        )
    if out is None and not check:
        raise click.UsageError("give a folder OUT for the merged model, or --check to see what would be done")
    quiet = merge_options.quiet

    def say(line: str) -> None:
        if not quiet or line.startswith("warning"):
            click.echo(line, err=True)

    models: Any = {name: frozenset(how.pop(name)) for name in ("allow_pickle", "allow_remote_code")}
    settings = Settings(**how, **models, say=say)
    if check:
        found = run_check(document, out, merge_options, settings)
        show(found, as_json=as_json)
        sys.exit(0 if found.can_run else 1)
    check_options(merge_options)
    merge_options.apply_global_options()

    def stopped() -> None:
        click.echo(f"fusekit: stopped; {out} is as it was, or whole. Run the same command again.", err=True)

    with interruptible(stopped):
        try:
            merged = run(document, str(out), merge_options, settings)
        except FusekitError:
            logging.info("the merge failed", exc_info=True)
            raise
    if as_json or not quiet:
        show(merged, as_json=as_json)


def drop_warning() -> None:
    """mergekit sets a config field by its former name, about which transformers warns: nothing a user could change."""
    deprecation = "`torch_dtype` is deprecated"
    logging.getLogger("transformers.configuration_utils").addFilter(
        lambda record: deprecation not in record.getMessage()
    )
