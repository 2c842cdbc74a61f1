"""``fusekit validate``, ``schema``, ``ls`` and ``cp``: fusion recipes, and those that ship with fusekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fusekit import yaml as safe_yaml
from fusekit.errors import RecipeError
from fusekit.recipe import shipped as shipped_recipes
from fusekit.recipe.loading import kind_of, load_recipe
from fusekit.recipe.shipped import schema_text
from fusekit.yaml import Document

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
@click.option("--json", "as_json", is_flag=True, help="Print JSON: valid, problems, warnings, not_looked_at.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Check a recipe: every mistake at once, with its line and the nearest known name. - is standard input.

    Of a fusion recipe, local models, templates and data are looked for as well; what is on the hub is not. Of a
    mergekit recipe the text is checked; `fusekit plan` also looks at its models.
    """
    import yaml

    problems: list[str] = []
    try:
        document = safe_yaml.load(recipe)
        if kind_of(document) == "mergekit":
            what, warnings, unseen = _merge_recipe(document, overrides)
            values = document.data
        else:
            what, unseen, values = _fusion_recipe(document, overrides)
            warnings = []
    except RecipeError as error:
        if not as_json:
            raise
        problems = [line.strip() for line in str(error).splitlines()]
        problems = problems[1:] or problems  # the first of several counts them
        warnings, unseen = [], []
    if as_json:
        found = {"valid": not problems, "problems": problems, "warnings": warnings, "not_looked_at": unseen}
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        click.get_current_context().exit(bool(problems))
    for line in warnings:
        click.echo(f"warning: {line}", err=True)
    if unseen:
        click.echo(f"not looked at: {', '.join(unseen)}", err=True)
    if resolved:
        click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(f"{recipe}: valid; {what}")


def _fusion_recipe(document: Document, overrides: tuple[str, ...]) -> tuple[str, list[str], Any]:
    """What a fusion recipe is, what of it is not here to be looked at, and its values."""
    from fusekit.artifacts import counted
    from fusekit.cli.capture import drop_noise
    from fusekit.pipeline.capturing import not_looked_at
    from fusekit.pipeline.stages import mistakes

    drop_noise()
    loaded = load_recipe(document, overrides, mistakes)
    names = [source.label for source in loaded.sources]
    what = f"pivot {loaded.pivot.path}, {counted(len(names), 'source')}: {', '.join(names)}"
    return what, not_looked_at(loaded), loaded.model_dump(mode="json")


def _merge_recipe(document: Document, overrides: tuple[str, ...]) -> tuple[str, list[str], list[str]]:
    """What a mergekit recipe is, warnings, and the models that are not looked at."""
    import fusekit.merge_methods  # noqa: F401  registers them with mergekit
    from fusekit.artifacts import counted
    from fusekit.merging.lint import lint

    if overrides:
        raise click.UsageError(f"--set is for fusion recipes, and {document.name} is a mergekit recipe: edit it")
    config, warnings = lint(document)
    models = [str(model) for model in config.referenced_models()]
    return f"{config.merge_method} of {counted(len(models), 'model')}", warnings, models


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
