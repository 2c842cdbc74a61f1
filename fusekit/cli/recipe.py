"""`fusekit validate`, `plan`, `schema`, `new`, `ls` and `cp`: recipes, and those that ship with fusekit."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from fusekit import yaml as safe_yaml
from fusekit.cli.common import drop_noise, print_json, show
from fusekit.disk import counted, human
from fusekit.errors import RecipeError
from fusekit.recipe import shipped
from fusekit.recipe.loading import kind_of, load_recipe
from fusekit.yaml import Document

if TYPE_CHECKING:
    from fusekit.devices import Need
    from fusekit.pipeline.plan import Plan
    from fusekit.pipeline.stage import Step

recipe_argument = click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. distill.loss=kl."
)


@click.command()
@recipe_argument
@overrides
@click.option("--resolved", is_flag=True, help="Print every value, presets and defaults written out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: valid, problems, not_looked_at.")
def validate(recipe: Path, *, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Check a recipe: every mistake at once, with its line and the nearest known name.

    Local models, templates and data are looked for as well, and the first 10,000 examples are read; what is on the hub
    is not looked at. Of a mergekit recipe it prints what `fusekit merge --check` does.
    """
    document = safe_yaml.load(recipe)
    check_merge(document, None, overrides, as_json=as_json)
    from fusekit.pipeline.capturing import not_looked_at
    from fusekit.pipeline.run import mistakes

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
    if as_json:
        print_json({"valid": True, "problems": [], "not_looked_at": unseen})
        return
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
def schema() -> None:
    """Print the JSON schema of fusion recipes, for editors."""
    click.echo(shipped.schema_text(), nl=False)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("fusion.yml"))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def new(file: Path, force: bool) -> None:
    """Write a minimal fusion recipe with comments to FILE, and the schema for editors beside it."""
    _write(file, shipped.NEW.encode(), force)
    _copy_schema(file.with_name(shipped.SCHEMA))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object of names and paths.")
def ls(as_json: bool) -> None:
    """List the shipped recipes. `fusekit cp NAME` copies one."""
    known = shipped.recipes()
    if as_json:
        print_json({name: str(path) for name, path in known.items()})
        return
    width = max(map(len, known))
    for name, path in known.items():
        click.echo(f"{name:<{width}}  {shipped.title(path)}")


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def cp(name: str, file: Path | None, force: bool) -> None:
    """Copy the shipped recipe NAME to FILE, or into the folder FILE, or to NAME.yml here.

    Beside a fusion recipe goes the schema that its first line names to editors, unless one is there.
    """
    source = shipped.find(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    _write(target, source.read_bytes(), force)
    if source.read_text(encoding="utf-8").startswith(shipped.EDITORS):
        _copy_schema(target.with_name(shipped.SCHEMA))


def _write(target: Path, data: bytes, force: bool) -> None:
    try:
        with target.open("wb" if force else "xb") as out:  # "x" refuses one that appears at this very moment, too
            out.write(data)
    except FileExistsError:
        raise RecipeError(f"{target} exists already; --force replaces it") from None
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
    click.echo(str(target))


def _copy_schema(target: Path) -> None:
    """Write the schema of fusion recipes; one that is there stays, as it may serve other recipes."""
    if not target.exists():
        _write(target, (shipped.folder() / shipped.SCHEMA).read_bytes(), force=False)


WIDTH = 100
_HEAD = ("what", "state", "examples", "tokens", "disk", "memory", "operations")
_ALIGN = "<<>>>>>"
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@click.command()
@recipe_argument
@click.argument("out", type=click.Path(path_type=Path), required=False)
@overrides
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes, 1e15 operations.")
def plan(recipe: Path, out: Path | None, *, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what `fusekit run RECIPE OUT` would do: stages, tokens, disk, memory, operations. Nothing is written.

    With OUT, what is there already is compared with the recipe. The exit status is 1 if something is known to stop the
    run: a model that is missing or gated, inputs that changed, too little disk or memory here. Of a mergekit recipe it
    prints what `fusekit merge --check` does.
    """
    from fusekit.pipeline.run import make_plan, mistakes

    document = safe_yaml.load(recipe)
    check_merge(document, out, overrides, as_json=as_json)
    drop_noise()
    loaded = load_recipe(document, overrides, mistakes)
    found = make_plan(loaded, str(recipe), out)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(table(found))
    if not found.can_run:
        sys.exit(1)


def table(plan: Plan) -> str:
    """The plan, at most 100 columns wide."""
    rows = [_HEAD, *map(_row, plan.steps), _total(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for row in rows:
        cells = [f"{cell[:width]:{side}{width}}" for cell, width, side in zip(row, widths, _ALIGN, strict=True)]
        lines.append("  ".join(cells).rstrip())
    sections = {
        "notes": [f"{step.stage} {step.name}: {step.note}" for step in plan.steps if step.note],
        "needed and free": _largest([need for need in plan.needs if need.fits]),
        "not known, so totals are at least": plan.unknown,
        "does not fit": _largest(plan.lacking),
        "would be refused": plan.refused,
    }
    lines.append("")
    for title, said in sections.items():
        for number, line in enumerate(dict.fromkeys(said)):
            text = f"{title}: {line}" if number == 0 else f"  {line}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
    lines.append("it can run" if plan.can_run else "it cannot run as it is, or not here")
    return "\n".join(lines)


def _row(step: Step) -> tuple[str, ...]:
    figures: list[tuple[float | None, Callable[[float], str]]] = [
        (step.rows, _count),
        (step.tokens, _count),
        (step.disk, human),
        (step.memory, human),
        (step.pflop, _operations),
    ]
    shown = [form(figure) if step.work and figure is not None else "" for figure, form in figures]
    return (f"{step.stage} {step.name}", step.state, *shown)


def _total(plan: Plan) -> tuple[str, ...]:
    (disk, whole), (memory, _), (pflop, _) = (plan.total(figure) for figure in ("disk", "memory", "pflop"))
    state = f"{sum(step.work for step in plan.steps)} of {len(plan.steps)}"
    return ("total to do", state, "", "", ("" if whole else "over ") + human(disk), human(memory), _operations(pflop))


def _operations(pflop: float) -> str:
    return f"{_count(pflop * 1e15)}FLOP" if pflop else ""


def _count(number: float) -> str:
    """``24.8 k``, ``1.66 T``."""
    size, unit = next(((size, unit) for size, unit in _UNITS if number >= size), (1, ""))
    return f"{number / size:,.3g} {unit}" if number >= 10_000 else f"{number:,.0f}"


def _largest(needs: list[Need]) -> list[str]:
    """Per place and kind, the largest need, and how many others there are."""
    by_kind: dict[tuple[str, str], list[Need]] = {}
    for need in needs:
        by_kind.setdefault((need.where, need.what.split()[0]), []).append(need)
    worst = [(max(some, key=lambda need: need.needed), len(some) - 1) for some in by_kind.values()]
    return [f"{need} (and {others} smaller)" if others else str(need) for need, others in worst]
