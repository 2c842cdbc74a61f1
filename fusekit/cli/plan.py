"""``fusekit plan``: parse, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from fusekit.cli.recipe import overrides


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@overrides
@click.option("--measure/--no-measure", default=True, help="Load the models that are here and small, to time them.")
@click.option(
    "--tflops",
    type=click.FloatRange(0, min_open=True),
    help="1e12 operations a second that your devices reach together: hours for what cannot be measured here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes, seconds, 1e15 operations.")
def plan(
    recipe: Path,
    out: Path | None,
    *,
    overrides: tuple[str, ...],
    measure: bool,
    tflops: float | None,
    as_json: bool,
) -> None:
    """What `fusekit run RECIPE OUT` would do: stages, tokens, disk, memory, time. Nothing is written.

    With OUT, what is there already is compared with the recipe. Ends with status 1 if something is known to stop the
    run: a model that is missing or gated, inputs that changed, disk or memory that do not suffice here.
    """
    from fusekit.cli.capture import drop_noise
    from fusekit.pipeline.checks import check_recipe
    from fusekit.plan.make import make_plan
    from fusekit.plan.table import table
    from fusekit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_recipe(loaded)
    drop_noise()
    found = make_plan(loaded, str(recipe), out, measured=measure)
    click.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False) if as_json else table(found, tflops))
    if not found.can_run:
        sys.exit(1)
