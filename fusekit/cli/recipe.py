"""``fusekit validate`` and ``fusekit schema``: what a fusion recipe says, and what it may say."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fusekit.recipe import Recipe, load_recipe

overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. distill.epochs=1."
)


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@overrides
@click.option("--resolved", is_flag=True, help="Print every value, presets and defaults written out.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool) -> None:
    """Check a fusion recipe: every mistake at once, with its line and the nearest known name."""
    loaded = load_recipe(recipe, overrides)
    if loaded.evaluate is not None and loaded.evaluate.lm_eval is not None:
        from fusekit.evaluation.lm_eval import check

        check(loaded.evaluate.lm_eval, f"{recipe}: evaluate.lm_eval")
    if resolved:
        import yaml

        click.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    else:
        names = ", ".join(source.label for source in loaded.sources)
        click.echo(f"{recipe}: valid; pivot {loaded.pivot.model}, {len(loaded.sources)} source(s): {names}")


@click.command()
def schema() -> None:
    """Print the JSON schema of fusion recipes, for editors."""
    document = Recipe.model_json_schema()
    include = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    document["properties"]["include"] = include | {"description": "Files in the recipe's folder to build upon."}
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
