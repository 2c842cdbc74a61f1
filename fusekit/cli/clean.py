"""``fusekit clean``: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from fusekit.cli.recipe import overrides
from fusekit.layout import STAGES


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
    from fusekit.disk import counted, human
    from fusekit.pipeline import clean as cleaning
    from fusekit.pipeline.run import write_log
    from fusekit.recipe.loading import load_recipe

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
