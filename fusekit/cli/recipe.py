"""``fusekit validate``, ``schema``, ``ls`` and ``cp``: fusion recipes, and those that ship with fusekit."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fusekit import yaml as safe_yaml
from fusekit.cli.common import drop_noise, print_json, show
from fusekit.errors import RecipeError
from fusekit.recipe import reference
from fusekit.recipe.loading import kind_of, load_recipe
from fusekit.yaml import Document

recipe_argument = click.argument(
    "recipe", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. distill.loss=kl."
)


@click.command()
@recipe_argument
@overrides
@click.option("--resolved", is_flag=True, help="Print every value, presets and defaults written out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: valid, problems, not_looked_at, read.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Check a recipe: every mistake at once, with its line and the nearest known name. - is standard input.

    Local models, templates and data are looked for as well, and the first 10,000 examples are read; what is on the hub
    is not looked at. Of a mergekit recipe it prints what `fusekit merge --check` does.
    """
    document = safe_yaml.load(recipe)
    check_merge(document, None, overrides, as_json=as_json)
    import yaml

    from fusekit.disk import counted
    from fusekit.pipeline.capturing import not_looked_at
    from fusekit.pipeline.run import mistakes
    from fusekit.pipeline.stage import look

    drop_noise()
    try:
        loaded = load_recipe(document, overrides, mistakes)
    except RecipeError as error:
        if not as_json:
            raise
        first, *more = [line.strip() for line in str(error).splitlines()]  # the first of several counts them
        print_json({"valid": False, "problems": more or [first]})
        sys.exit(1)
    unseen, names = not_looked_at(loaded), [source.label for source in loaded.sources]
    sections = {"data": loaded.data, "evaluate": loaded.evaluate}
    read = {name: look(section) for name, section in sections.items() if section is not None}
    looked = {name: found for name, found in read.items() if found is not None}
    if as_json:
        counts = {name: found._asdict() for name, found in looked.items()}
        print_json({"valid": True, "problems": [], "not_looked_at": unseen, "read": counts})
        return
    for name, found in looked.items():
        click.echo(f"{name}: {found}", err=True)
    if unseen:
        click.echo(f"not here, so taken for names on the hub, which is not asked: {', '.join(unseen)}", err=True)
    if resolved:
        click.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(f"{recipe}: valid; pivot {loaded.pivot.path}, {counted(len(names), 'source')}: {', '.join(names)}")


def check_merge(document: Document, out: Path | None, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Of a mergekit recipe, print what a merge would do and every problem, and exit; of others do nothing."""
    if kind_of(document) == "fusion":
        return
    if overrides:
        raise click.UsageError(f"--set is for fusion recipes, and {document.name} is a mergekit recipe: edit it")
    from fusekit.cli.merge import drop_warning
    from fusekit.merging import check

    drop_warning()
    found = check(document, out)
    show(found, as_json=as_json)
    sys.exit(0 if found.can_run else 1)


@click.command()
@click.option("--markdown", is_flag=True, help="Print the page of every key and preset instead.")
def schema(markdown: bool) -> None:
    """Print the JSON schema of fusion recipes, for editors."""
    click.echo(reference.markdown() if markdown else reference.schema_text(), nl=False)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("fusion.yml"))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def new(file: Path, force: bool) -> None:
    """Write a minimal fusion recipe with comments to FILE, and the schema for editors beside it."""
    _write(file, reference.NEW.encode(), force)
    _copy_schema(file.with_name(reference.SCHEMA))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object of names and paths.")
def ls(as_json: bool) -> None:
    """List the shipped recipes. `fusekit cp NAME` copies one."""
    known = reference.recipes()
    if as_json:
        print_json({name: str(path) for name, path in known.items()})
        return
    width = max(map(len, known))
    for name, path in known.items():
        click.echo(f"{name:<{width}}  {reference.title(path)}")


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def cp(name: str, file: Path | None, force: bool) -> None:
    """Copy the shipped recipe NAME to FILE, or into the folder FILE, or to NAME.yml here.

    Beside a fusion recipe goes the schema that its first line names to editors, unless one is there.
    """
    source = reference.find(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    _write(target, source.read_bytes(), force)
    if source.read_text(encoding="utf-8").startswith(reference.EDITORS):
        _copy_schema(target.with_name(reference.SCHEMA))


def _write(target: Path, data: bytes, force: bool) -> None:
    try:
        with target.open("wb" if force else "xb") as out:  # "x" refuses one that appears at this very moment, too
            out.write(data)
    except FileExistsError:
        raise RecipeError(f"{target} exists already; --force replaces it") from None
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
    click.echo(f"{target}")


def _copy_schema(target: Path) -> None:
    """Write the schema of fusion recipes; one that is there stays, as it may serve other recipes."""
    wanted = reference.schema().read_bytes()
    try:
        if not target.exists():
            target.write_bytes(wanted)
            click.echo(f"{target}")
        elif target.read_bytes() != wanted:
            click.echo(f"{target} is another one and stays; `fusekit schema` prints this version's", err=True)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
