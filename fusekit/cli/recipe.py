"""``fusekit validate`` and ``fusekit schema``: what a fusion recipe says, and what it may say."""

from __future__ import annotations

from pathlib import Path

import click

from fusekit.errors import RecipeError
from fusekit.recipe import load_recipe
from fusekit.recipe.kinds import kind_of
from fusekit.recipe.schema import schema_text

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value, e.g. distill.loss=kl.",
)


def refuse_mergekit(recipe: Path) -> None:
    """Say what runs a mergekit recipe, where a fusion recipe is asked for. Raises RecipeError."""
    try:
        kind = kind_of(recipe)
    except RecipeError:
        return  # what is wrong with it is said, with lines, when it is loaded
    if kind == "mergekit":
        raise RecipeError(
            f"{recipe} is a mergekit recipe, which merges models of one architecture: `fusekit merge {recipe} OUT` "
            "runs it. A fusion recipe names a pivot and sources"
        )


def is_recipe(name: str) -> bool:
    """Whether what may be a model or a recipe is a YAML file."""
    return Path(name).suffix in (".yml", ".yaml") and Path(name).is_file()


def refuse_options(context: click.Context, allowed: set[str]) -> None:
    """Refuse options beside a fusion recipe, whose settings are its own. Raises click.UsageError."""
    from click.core import ParameterSource

    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if foreign := sorted(given - allowed):
        spelled = next((p.opts[0] for p in context.command.params if p.name == foreign[0]), foreign[0])
        way = "see `fusekit clean --stage`" if spelled == "--overwrite" else "see `fusekit run --set`"
        raise click.UsageError(f"{spelled} with a recipe: its settings are those of the recipe; {way}")


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@overrides
@click.option("--resolved", is_flag=True, help="Print every value, presets and defaults written out.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool) -> None:
    """Check a fusion recipe: every mistake at once, with its line and the nearest known name."""
    from fusekit.pipeline.checks import check_recipe

    refuse_mergekit(recipe)
    loaded = load_recipe(recipe, overrides)
    check_recipe(loaded)
    if resolved:
        import yaml

        click.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    else:
        names = ", ".join(source.label for source in loaded.sources)
        click.echo(f"{recipe}: valid; pivot {loaded.pivot.path}, {len(loaded.sources)} source(s): {names}")


@click.command()
def schema() -> None:
    """Print the JSON schema of fusion recipes, for editors."""
    click.echo(schema_text(), nl=False)
