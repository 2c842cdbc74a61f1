"""A plan on one screen."""

from __future__ import annotations

import textwrap

from fusekit.artifacts import human
from fusekit.plan.figures import GOES_ON, Plan, Step
from fusekit.resources import Need

WIDTH = 100
_HEAD = ("what", "state", "rows", "tokens", "disk", "memory", "time")
_ALIGN = "<<>>>>>"


def table(plan: Plan, tflops: float | None = None) -> str:
    """At most 100 columns wide. tflops: 1e12 operations a second, for the hours of what was not measured."""
    rows = [_HEAD, *(_row(step, tflops) for step in plan.steps), _total(plan, tflops)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = _section(f"plan of {plan.recipe}" + (f" into {plan.out}" if plan.out else ""), ["nothing is written"])
    lines.append("")
    for row in rows:
        cells = [f"{_cut(cell, width):{side}{width}}" for cell, width, side in zip(row, widths, _ALIGN, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    lines += _section("on this machine", [_machine(plan)])
    lines += _section("notes", [f"{_name(step)}: {note}" for step in plan.steps for note in step.notes])
    lines += _section("needed and free", _shown([need for need in plan.needs if need.fits]))
    lines += _section("figures", plan.basis)
    lines += _section("not found out, so totals are at least", plan.unknown)
    lines += _section("does not fit", _shown(plan.lacking))
    lines += _section("would be refused", plan.refused)
    lines.append("it can run" if plan.can_run else "it cannot run as it is, or not here")
    return "\n".join(lines)


def _row(step: Step, tflops: float | None) -> tuple[str, ...]:
    if not step.work:
        return (_name(step), step.state, "", "", "", "", "")
    return (
        _name(step),
        step.state,
        f"{step.rows:,}" if step.rows is not None else ("" if step.stage in ("pivot", "merge") else "?"),
        _count(step.tokens) if step.tokens is not None else ("" if step.stage in ("pivot", "align", "merge") else "?"),
        human(step.disk) if step.disk is not None else "?",
        human(step.memory) if step.memory is not None else ("" if step.stage in ("data", "align", "evaluate") else "?"),
        _time(step.seconds, step.pflop, tflops),
    )


def _name(step: Step) -> str:
    return f"{step.stage} {step.name}"


def _total(plan: Plan, tflops: float | None) -> tuple[str, ...]:
    disk, whole = plan.total("disk")
    memory, _ = plan.total("memory")
    seconds, timed = plan.total("seconds")
    pflop, _ = plan.total("pflop")
    time = ("" if timed else "over ") + _duration(seconds) if seconds else _time(None, pflop or None, tflops)
    going = sum(step.state == GOES_ON for step in plan.steps)
    todo = sum(step.work for step in plan.steps)
    state = f"{todo} of {len(plan.steps)}" + (f", {going} begun" if going else "")
    return ("total to do", state, "", "", ("" if whole else "over ") + human(disk), human(memory), time)


def _time(seconds: float | None, pflop: float | None, tflops: float | None) -> str:
    if seconds is not None:
        return _duration(seconds)
    if pflop is None:
        return "?"
    if tflops is not None:
        return f"{_duration(pflop * 1e3 / tflops)} at {tflops:g} TFLOP/s"
    return f"{pflop:,.3g} PFLOP" if pflop < 1000 else f"{pflop:,.0f} PFLOP"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


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
    """Per place and kind, the need that leaves the least; of the others how many there are."""
    by_kind: dict[tuple[str, str], list[Need]] = {}
    for need in needs:
        by_kind.setdefault((need.where, need.what.split()[0]), []).append(need)
    lines = []
    for some in by_kind.values():
        worst = max(some, key=lambda need: need.needed)
        lines.append(str(worst) + (f" (and {len(some) - 1} more of less)" if len(some) > 1 else ""))
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    found = []
    for number, line in enumerate(dict.fromkeys(lines)):
        text = f"{title}: {line}" if number == 0 else f"  {line}"
        found += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
    return found


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
