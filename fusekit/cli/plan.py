"""``fusekit plan``: a plan on one screen."""

from __future__ import annotations

import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusekit import yaml as safe_yaml
from fusekit.cli.common import drop_noise, print_json
from fusekit.cli.recipe import check_merge, overrides, recipe_argument
from fusekit.disk import human

if TYPE_CHECKING:
    from fusekit.devices import Need
    from fusekit.pipeline.plan import Plan
    from fusekit.pipeline.stage import Step

WIDTH = 100
_HEAD = ("what", "state", "examples", "tokens", "disk", "memory", "operations")
_ALIGN = "<<>>>>>"


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
    from fusekit.recipe.loading import load_recipe

    document = safe_yaml.load(recipe)
    check_merge(document, out, overrides, as_json=as_json)
    drop_noise()
    loaded = load_recipe(document, overrides, partial(mistakes, files=False))  # which the plan itself looks for
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
    lines = _section(f"plan of {plan.recipe}" + (f" into {plan.out}" if plan.out else ""), ["nothing is written"])
    lines.append("")
    for row in rows:
        cells = [f"{_cut(cell, width):{side}{width}}" for cell, width, side in zip(row, widths, _ALIGN, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    lines += _section("machine", [_machine(plan)])
    lines += _section("notes", [f"{step.stage} {step.name}: {note}" for step in plan.steps for note in step.notes])
    lines += _section("needed and free", _shown([need for need in plan.needs if need.fits]))
    lines += _section("figures", plan.basis)
    lines += _section("not known, so totals are at least", plan.unknown)
    lines += _section("does not fit", _shown(plan.lacking))
    lines += _section("would be refused", plan.refused)
    lines.append("it can run" if plan.can_run else "it cannot run as it is, or not here")
    return "\n".join(lines)


def _row(step: Step) -> tuple[str, ...]:
    name = f"{step.stage} {step.name}"
    if not step.work:
        return (name, step.state, "", "", "", "", "")
    return (
        name,
        step.state,
        f"{step.rows:,}" if step.rows is not None else ("" if step.stage in ("pivot", "merge") else "?"),
        _count(step.tokens) if step.tokens is not None else ("" if step.stage in ("pivot", "align", "merge") else "?"),
        human(step.disk) if step.disk is not None else "?",
        human(step.memory) if step.memory is not None else ("" if step.stage in ("data", "align", "evaluate") else "?"),
        _operations(step.pflop) if step.pflop is not None else "",
    )


def _total(plan: Plan) -> tuple[str, ...]:
    (disk, whole), (memory, _), (pflop, _) = (plan.total(figure) for figure in ("disk", "memory", "pflop"))
    resumed = sum(step.state == "resumes" for step in plan.steps)
    state = f"{sum(step.work for step in plan.steps)} of {len(plan.steps)}" + (f", {resumed} begun" if resumed else "")
    return ("total to do", state, "", "", ("" if whole else "over ") + human(disk), human(memory), _operations(pflop))


def _operations(pflop: float) -> str:
    for unit in ("PFLOP", "TFLOP", "GFLOP"):
        if pflop >= 1 or unit == "GFLOP":
            break
        pflop *= 1000
    return f"{pflop:,.3g} {unit}" if pflop < 1000 else f"{pflop:,.0f} {unit}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size and number >= 10_000:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def _machine(plan: Plan) -> str:
    found = plan.machine
    gpus = ", ".join(f"{gpu['name']} ({human(gpu['free'])} free)" for gpu in found["gpus"]) or "no GPU"
    return (
        f"{found['cores']} cores, {human(found['memory_free'])} of memory {found['memory_of']}, {gpus}; "
        f"{human(found['disk_free'])} free on the disk of {found['disk_of']}"
    )


def _shown(needs: list[Need]) -> list[str]:
    """Per place and kind, the largest need, and how many others there are."""
    by_kind: dict[tuple[str, str], list[Need]] = {}
    for need in needs:
        by_kind.setdefault((need.where, need.what.split()[0]), []).append(need)
    worst = [(max(some, key=lambda need: need.needed), len(some) - 1) for some in by_kind.values()]
    return [f"{need} (and {others} smaller)" if others else str(need) for need, others in worst]


def _section(title: str, lines: list[str]) -> list[str]:
    found = []
    for number, line in enumerate(dict.fromkeys(lines)):
        text = f"{title}: {line}" if number == 0 else f"  {line}"
        found += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
    return found


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
