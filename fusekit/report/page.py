"""The report of a run, and an alignment, as one HTML page: no script, nothing loaded, all data escaped.

The templates hold the words and the markup; what they show is computed here, as plain values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from fusekit.alignment.quality import LOST, MEANING, AlignmentQuality, Sample
from fusekit.artifacts import joined_hash
from fusekit.data.reading import DROPPED, REASONS
from fusekit.disk import counted, human
from fusekit.distillation.dataset import CHOSEN
from fusekit.evaluation.table import Table, fixed, tables
from fusekit.layout import BASELINE, MERGED, PIVOT
from fusekit.report import text
from fusekit.report.facts import Facts, Worth

if TYPE_CHECKING:
    from fusekit.distillation.worth import TeacherWorth

CARD = "README.md"
COLOURS = 8
MOST_POINTS = 240  # of a curve; more cannot be told apart at its width
_KEYS = 3  # of examples, in a table
_QUARANTINED = 10  # examples named per model
_TITLES = {PIVOT: "pivot", BASELINE: "plain fine-tuning", MERGED: "merged model"}

Drawing = dict[str, Any]


def titled(model: str) -> str:
    """What the report calls a model of ``results.json``: ``source llama``, ``distilled llama``."""
    for folder, kind in (("sources/", "source "), ("targets/", "distilled ")):
        if model.startswith(folder):
            return kind + model.removeprefix(folder)
    return _TITLES.get(model, model)


TEMPLATES = Environment(
    loader=PackageLoader("fusekit.report"),
    autoescape=lambda name: name is not None and ".html" in name,  # that of the card escapes with its own filters
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update(
    name=text.name,
    block=text.block,
    fixed=fixed,
    percent=text.percent,
    seconds=text.seconds,
    scaled=text.scaled,
    listed=text.listed,
    counted=counted,
    human=human,
    count=lambda number: f"{number:,.0f}",
)
_STYLE = (resources.files("fusekit.report") / "templates" / "style.css").read_text(encoding="utf-8")
TEMPLATES.globals.update(MEANING=MEANING, LOST=LOST, titled=titled, style=Markup(_STYLE))


def page(facts: Facts) -> str:
    """The report of a run as HTML. The same artifacts give the same text."""
    names = [*facts.sources, *(name for name in facts.wanted if name not in facts.sources)]
    # A source, the model that it teaches and its part of the merge have the same colour.
    colour = {name: f"c{number % COLOURS + 1}" for number, name in enumerate(names)}
    colour |= {PIVOT: "cp", BASELINE: "cb", MERGED: "cm"}

    def colour_of(model: str) -> str:
        return colour.get(model.removeprefix("sources/").removeprefix("targets/"), "cp")

    metrics = results(facts)
    pivot = facts.model(PIVOT)
    return _rendered(
        "report.html.jinja",
        facts=facts,
        recipe=facts.recipe,
        title=f"Fusion of {text.listed(facts.sources)} into {pivot.repository or PurePath(pivot.model).name}",
        lead=lead(facts),
        missing=_missing(facts),
        metrics=metrics,
        head=next((table for table in metrics if table.mean(MERGED)), None),
        taught={name: _taught(facts, name) for name in facts.targets},
        charts=_charts(facts, colour_of),
        heat=heat_map(facts),
        left_out=left_out(facts),
        stages=stages(facts),
        given=yaml.safe_dump(
            facts.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        ),
        versions=_versions(facts),
        colour_of=colour_of,
    )


def alignment_page(quality: AlignmentQuality, samples: Sequence[Sample], worth: TeacherWorth | None = None) -> str:
    """An alignment as HTML: the figures over the texts, and samples (:func:`fusekit.alignment.quality.sample_of`)."""
    return _rendered(
        "alignment.html.jinja",
        title=f"Alignment of {quality.source} with {quality.pivot}",
        # With scripts and cases in the order that those of a run have.
        quality=TypeAdapter(AlignmentQuality).validate_python(quality.to_dict()),
        worth=Worth.model_validate(worth.to_dict()) if worth is not None else None,
        name=quality.source,
        samples=samples,
    )


def _rendered(template: str, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(**values) + "\n"


def results(facts: Facts) -> list[Table]:
    """A table per metric."""
    return tables(facts.results.model_dump()) if facts.results else []


def lead(facts: Facts) -> str:
    """What was fused, for somebody who has not heard of it."""
    on = f"{facts.counts.kept:,} examples" if facts.counts else "the same examples"
    if len(facts.wanted) == 1:
        learned = f"A copy of the pivot learned what {'it' if len(facts.sources) == 1 else 'they'} predicted"
    else:
        learned = "Each taught its own copy of the pivot, its distilled model, what it predicted"
    merged = MERGED in facts.artifacts and len(facts.wanted) > 1
    return (
        f"One model, the pivot, learned from {counted(len(facts.sources), 'other')}: {text.listed(facts.sources)}. "
        f"{learned} at each token of {on}, although each model reads text through its own tokenizer. "
        + (f"The {len(facts.wanted)} distilled models were then merged into one. " if merged else "")
        + "The result has the architecture and the tokenizer of the pivot, and costs no more to run."
    )


def _missing(facts: Facts) -> list[str]:
    """What the run has not done, or not yet, a sentence each."""
    recipe, merged = facts.recipe, MERGED in facts.artifacts
    live = [source.label for source in recipe.sources if source.on_the_fly]
    lacking = [
        name
        for name in facts.entries
        if name not in live and (name not in facts.stores or not facts.stores[name].complete)
    ]
    unaligned = [name for name in facts.sources if name not in facts.qualities]
    said = {
        "The data is not prepared yet.": not facts.counts,
        f"Not captured completely yet: {text.listed(lacking)}.": lacking,
        f"Not aligned yet: {text.listed(unaligned)}.": unaligned,
        "No model is distilled yet.": not facts.targets,
        f"Training has begun and is not finished: {text.listed(facts.training)}.": facts.training,
        "The recipe has no merge: the distilled models are the result.": recipe.merge is None,
        "The distilled models are not merged yet.": recipe.merge is not None and not merged,
        "The recipe has no evaluation.": recipe.evaluate is None,
        "Nothing is evaluated yet.": recipe.evaluate is not None and facts.results is None,
    }
    return [line for line, applies in said.items() if applies]


def _taught(facts: Facts, target: str) -> dict[str, float]:
    """The share of the examples that each model taught a distilled one, over all epochs."""
    record = facts.targets[target]
    examples = record.counts.get("rows", 0.0)
    pivot = [PIVOT] if facts.recipe.fusion.include_pivot else []
    return {n: record.counts.get(CHOSEN + n, 0.0) / examples for n in [*pivot, *record.sources]} if examples else {}


def left_out(facts: Facts) -> list[dict[str, Any]]:
    """What was skipped, cut, quarantined or not matched: where, how many, why, whether it was still used, and keys."""
    found = []

    def add(where: str, number: int, why: str, used: bool, keys: Sequence[str] = ()) -> None:
        found.append({"where": where, "number": number, "why": why, "used": used, "examples": keys[:_KEYS]})

    if facts.counts is not None:
        for reason, count in facts.counts.reasons.items():
            refusal = f": {facts.counts.first_refusal}" if reason == "refused" and facts.counts.first_refusal else ""
            why, used = REASONS.get(reason, reason) + refusal, reason not in DROPPED
            add("data", count, why, used, facts.counts.keys.get(reason, []))
        for name, count in facts.counts.unused.items():
            add("data", count, f"kept, without the field {name}, which is not used", True)
    for name, store in facts.stores.items():
        rows, where = store.quarantined, f"capture of {name}"
        for row in rows[:_QUARANTINED]:
            add(where, 1, f"quarantined: {row.reason}", False, [row.key])
        if rest := [row.key for row in rows[_QUARANTINED:]]:
            add(where, len(rest), "quarantined, like those above", False, rest)
    for name, record in facts.trained.items():
        where = f"training of {titled(name)}"
        for model, keys in record.unmatched.items():
            why = f"not among the examples captured from {model}; trained without its teaching"
            add(where, len(keys), why, True, keys)
        if record.skipped_steps:
            add(where, record.skipped_steps, "optimizer steps whose loss or gradient was non-finite", False)
    return found


def stages(facts: Facts) -> dict[str, tuple[str, str, float | None]]:
    """What each artifact holds, by its place and in the order of the stages, its hash, and the seconds that it took."""

    def held(count: int, noun: str, sizes: Iterable[int]) -> str:
        return f"{counted(count, noun)}, {human(sum(sizes))}"

    found: dict[str, tuple[str, str, float | None]] = {}
    for place, known in facts.artifacts.items():
        # The card is left out: it is written when everything else is known.
        files = {name: file for name, file in known.files.items() if name != CARD}
        content = joined_hash(f"{name} {file.xxh3}" for name, file in files.items())
        holds = held(len(known.files), "file", (file.size for file in files.values()))
        found[place] = holds, content, known.made.get("seconds")
    captures = {}
    for name, store in facts.stores.items():
        holds = held(len(store), "example", (record.size for record in store.records.values()))
        captures[f"captures/{name}"] = holds, joined_hash(record.xxh3 for record in store.records.values()), None
    data = {"data": found.pop("data")} if "data" in found else {}
    return data | captures | found


def _versions(facts: Facts) -> dict[str, str]:
    """Versions and hosts that made the artifacts; several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for known in facts.artifacts.values():
        for name, value in known.made.items():
            if isinstance(value, str):
                found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


# ---- loss curves

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 534, 14, 256
_FRAME = {"width": 560, "height": 300, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM}

Points = Sequence[tuple[float, float]]


def _charts(facts: Facts, colour_of: Callable[[str], str]) -> list[Drawing]:
    """The loss on the text and the loss on the teachers by step, a curve per model."""
    trained = facts.trained.items()
    on_text = {name: record.points("lm_loss") or record.points("loss") for name, record in trained}
    taught = {name: record.points("fusion_loss") for name, record in trained if record.sources}
    drawn = {"Loss on the text, nats per token": on_text, "Loss on the teachers, nats per token": taught}
    return [
        {"title": title, **found}
        for title, curves in drawn.items()
        if (found := chart({(titled(name), colour_of(name)): points for name, points in curves.items()}))
    ]


def chart(series: Mapping[tuple[str, str], Points]) -> Drawing | None:
    """Lay out curves over optimizer steps, by name and colour; None where no curve has two points."""
    curves = {key: points for key, points in series.items() if len(points) > 1}
    if not curves:
        return None
    every = [point for points in curves.values() for point in points]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low, high = min(x_ticks[0], *xs), max(xs)

    def across(x: float) -> float:
        return round(_LEFT + (x - low) / (high - low or 1) * (_RIGHT - _LEFT), 1)

    def down(y: float) -> float:
        return round(_BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_BOTTOM - _TOP), 1)

    drawn = []
    for (name, colour), points in curves.items():
        thinned = [*points[:: -(-len(points) // MOST_POINTS)], points[-1]]
        path = "M" + "L".join(f"{across(x):g} {down(y):g}" for x, y in thinned)
        end = across(points[-1][0]), down(points[-1][1])
        drawn.append(
            {"name": name, "colour": colour, "path": path, "end": end, "first": points[0][1], "last": points[-1][1]}
        )
    x_labels = [(across(x), f"{x:g}") for x in x_ticks if low <= x <= high]
    return {"x": x_labels, "y": [(down(y), f"{y:g}") for y in y_ticks], "curves": drawn, **_FRAME}


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    power: float = 10.0 ** math.floor(math.log10((high - low) / 4))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / 4 * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


# ---- merge coefficients


def heat_map(facts: Facts) -> Drawing | None:
    """The mean coefficient of each distilled model by module and layer (None: outside of the layers).

    equal: the share of each model if all were alike. reach: the largest distance from it. figures: mean, least and
    greatest share of each model over all tensors. None where no coefficients were recorded.
    """
    tensors = facts.coefficients.tensors if facts.coefficients else {}
    shares: dict[str, dict[tuple[str, int | None], list[float]]] = {}
    for name, tensor in tensors.items():
        for model, share in tensor.coefficients.items():
            shares.setdefault(PurePath(model).name, {}).setdefault(place_of(name), []).append(share)
    if not shares:
        return None
    models = {name: shares[name] for name in sorted(shares, key=lambda name: (name not in facts.wanted, name))}
    cells = {name: {place: math.fsum(v) / len(v) for place, v in of.items()} for name, of in models.items()}
    every = {name: [share for values in of.values() for share in values] for name, of in models.items()}
    places, equal = {place for of in cells.values() for place in of}, 1 / len(models)
    inside = {module for module, layer in places if layer is not None}
    modules = {module for module, _ in places}
    return {
        "cells": cells,
        "layers": sorted({layer for _, layer in places if layer is not None}),
        "modules": sorted(modules, key=lambda name: (name in inside, "norm" in name, "attn" not in name, name)),
        "equal": equal,
        "reach": max(abs(share - equal) for of in cells.values() for share in of.values()),
        "tensors": len(tensors),
        "figures": {name: (math.fsum(each) / len(each), min(each), max(each)) for name, each in every.items()},
    }


def place_of(name: str) -> tuple[str, int | None]:
    """Module and layer of a tensor: ``model.layers.3.mlp.experts.7.w1.weight`` -> ``mlp.experts.*.w1``, 3."""
    found = re.fullmatch(r"(?:.*?\.)??(\d{1,5})\.(.+)", name.removesuffix(".weight"))
    if found is None:
        return name.removesuffix(".weight"), None
    return re.sub(r"\.\d+(?=\.|$)", ".*", found[2]), int(found[1])
