"""``fusekit validate``, ``schema``, ``ls`` and ``cp``: fusion recipes, and those that ship with fusekit."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fusekit.errors import RecipeError
from fusekit.recipe import shipped as shipped_recipes
from fusekit.recipe.loading import load_recipe
from fusekit.recipe.shipped import schema_text

recipe_argument = click.argument(
    "recipe", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value, e.g. distill.loss=kl.",
)


@click.command()
@recipe_argument
@overrides
@click.option("--resolved", is_flag=True, help="Print every value, presets and defaults written out.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool) -> None:
    """Check a fusion recipe: every mistake at once, with its line and the nearest known name. - is standard input."""
    from fusekit.pipeline.stages import check_recipe

    loaded = load_recipe(recipe, overrides)
    check_recipe(loaded)
    if resolved:
        import yaml

        click.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    else:
        from fusekit.artifacts import counted

        names = [source.label for source in loaded.sources]
        click.echo(f"{recipe}: valid; pivot {loaded.pivot.path}, {counted(len(names), 'source')}: {', '.join(names)}")


@click.command()
def schema() -> None:
    """Print the JSON schema of fusion recipes, for editors."""
    click.echo(schema_text(), nl=False)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object of names and paths.")
def ls(as_json: bool) -> None:
    """List the shipped recipes. `fusekit cp NAME` copies one."""
    known = shipped_recipes.recipes()
    if as_json:
        click.echo(json.dumps({name: str(path) for name, path in known.items()}, indent=1))
        return
    width = max(map(len, known))
    for name, path in known.items():
        click.echo(f"{name:<{width}}  {shipped_recipes.title(path)}")


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def cp(name: str, file: Path | None, force: bool) -> None:
    """Copy the shipped recipe NAME to FILE, or into the folder FILE, or to NAME.yml here.

    Beside a fusion recipe goes the schema that its first line names to editors, unless one is there.
    """
    source = shipped_recipes.find(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        # "x" refuses an existing file, also one that appears at this very moment.
        with target.open("wb" if force else "xb") as out:
            out.write(source.read_bytes())
    except FileExistsError:
        raise RecipeError(f"{target} exists already; --force replaces it") from None
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
    click.echo(f"{target}")
    if source.read_text(encoding="utf-8").startswith(shipped_recipes.EDITORS):
        _copy_schema(target.with_name(shipped_recipes.SCHEMA))


def _copy_schema(target: Path) -> None:
    """Write the schema of fusion recipes; one that is there stays, as it may serve other recipes."""
    wanted = shipped_recipes.schema().read_bytes()
    try:
        if not target.exists():
            target.write_bytes(wanted)
            click.echo(f"{target}")
        elif target.read_bytes() != wanted:
            click.echo(f"{target} is another one and stays; `fusekit schema` prints this version's", err=True)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
