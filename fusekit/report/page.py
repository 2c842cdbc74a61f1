"""The report of a run, and an alignment, as one HTML page: no script, nothing loaded, all data escaped.

The templates hold the words and the markup; what they show is computed here, as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from fusekit.alignment.quality import LOST, MEANING, Sample
from fusekit.artifacts import Artifact, joined_hash
from fusekit.data.reading import DROPPED, REASONS
from fusekit.disk import counted, human
from fusekit.distillation.dataset import CHOSEN
from fusekit.evaluation.table import Table, fixed, tables
from fusekit.layout import BASELINE, MERGED, PIVOT
from fusekit.recipe import Recipe
from fusekit.report import text
from fusekit.report.facts import BASELINE_PLACE, Coefficients, Facts, ModelFacts, Quality, Tensor, Training, Worth

if TYPE_CHECKING:
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.distillation.worth import TeacherWorth

CARD = "README.md"
COLOURS = 8
_KEYS = 3  # of examples, in a table
_QUARANTINED = 10  # examples named per model
_KINDS = {"sources": "source", "targets": "distilled"}
_TITLES = {PIVOT: "pivot", BASELINE: "plain fine-tuning", MERGED: "merged model"}
# Invisible characters that turn the direction of whatever follows them, also on this page.
_TURNS = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), "⋯")


def titled(model: str) -> str:
    """What the report calls a model of ``results.json``: ``source llama``, ``distilled llama``."""
    kind, _, name = model.partition("/")
    if name and kind in _KINDS:
        return f"{_KINDS[kind]} {name}"
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
    shorten=text.shorten,
    listed=text.listed,
    count=lambda number: f"{number:,.0f}",
    straight=lambda shown: shown.translate(_TURNS),
    breakable=lambda place: Markup("/<wbr>").join(text.name(place).split("/")),  # join escapes the parts
)
_STYLE = (resources.files("fusekit.report") / "templates" / "style.css").read_text(encoding="utf-8")
TEMPLATES.globals.update(MEANING=MEANING, LOST=LOST, titled=titled, style=Markup(_STYLE))


def page(facts: Facts) -> str:
    """The report of a run as HTML. The same artifacts give the same text."""
    colour, everything, metrics = _colours(facts), made(facts), results(facts)
    pivot = facts.model_name(PIVOT).rstrip("/")
    pivot = pivot if pivot.count("/") == 1 and facts.models.get(PIVOT) else pivot.rsplit("/", 1)[-1]
    return _rendered(
        "report.html.jinja",
        facts=facts,
        title=f"Fusion of {text.listed([text.name(name) for name in facts.sources])} into {text.name(pivot)}",
        lead=lead(facts),
        missing=_missing_stages(facts),
        metrics=metrics,
        head=next((table for table in metrics if table.mean(MERGED)), None),
        graph=recipe_graph(facts, colour),
        models=model_rows(facts),
        recipe=recipe_text(facts.recipe),
        given=given_text(facts.recipe),
        teachers={name: teachers(record) for name, record in facts.targets.items() if record.sources},
        training=training_rows(facts),
        charts=loss_charts(facts, colour),
        heat=heat_map(facts.coefficients, list(facts.targets)),
        left_out=left_out(facts),
        made=everything,
        times=_times(everything),
        circumstances=_circumstances(everything),
        identities=identities(facts),
        colour_of=lambda model: colour.get(model.removeprefix("sources/").removeprefix("targets/"), "cp"),
    )


def alignment_page(quality: AlignmentQuality, samples: Sequence[Sample], worth: TeacherWorth | None = None) -> str:
    """An alignment as HTML: the figures over the texts, and samples (:func:`fusekit.alignment.quality.sample_of`)."""
    return _rendered(
        "alignment.html.jinja",
        title=f"Alignment of {text.name(quality.source)} with {text.name(quality.pivot)}",
        quality=Quality.model_validate(quality.to_dict()),
        worth=Worth.model_validate(worth.to_dict()) if worth is not None else None,
        samples=samples,
    )


def _rendered(template: str, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(**values) + "\n"


def _colours(facts: Facts) -> dict[str, str]:
    """Class of colour by name; a source, the model that it teaches and its part of the merge have the same."""
    names = [*facts.sources, *(name for name in facts.targets if name not in facts.sources)]
    found = {name: f"c{number % COLOURS + 1}" for number, name in enumerate(names)}
    return found | {PIVOT: "cp", BASELINE: "cb", MERGED: "cm"}


def results(facts: Facts) -> list[Table]:
    """A table per metric."""
    return tables(facts.results.model_dump()) if facts.results else []


def lead(facts: Facts) -> str:
    """What was fused, for somebody who has not heard of it."""
    joint, one = facts.value("fusion.mode") == "joint", len(facts.sources) == 1
    on = f"{facts.counts.kept:,} examples" if facts.counts else "the same examples"
    if joint or one:
        learned = f"A copy of the pivot, the distilled model, learned what {'it' if one else 'they'} predicted"
    else:
        learned = "Each taught its own copy of the pivot, its distilled model, what it predicted"
    merged = (
        ""
        if joint or len(facts.merged_from) < 2
        else (f"The {len(facts.merged_from)} distilled models were then merged into one. ")
    )
    return (
        f"One model, the pivot, learned from {counted(len(facts.sources), 'other')}: {text.listed(facts.sources)}. "
        f"{learned} at each token of {on}, although each model reads text through its own tokenizer. {merged}"
        "The result has the architecture and the tokenizer of the pivot, and costs no more to run."
    )


def _missing_stages(facts: Facts) -> list[str]:
    """What the run has not done, or not yet, a sentence each."""
    captured = [name for name, entry in facts.entries.items() if name == PIVOT or not entry.get("on_the_fly")]
    lacking = [name for name in captured if name not in facts.stores or not facts.stores[name].complete]
    unaligned = [name for name in facts.sources if name not in facts.qualities]
    merges, evaluates = facts.value("merge") is not None, facts.value("evaluate") is not None
    said = {
        "The data is not prepared yet.": not facts.counts,
        f"Not captured completely yet: {text.listed(lacking)}.": lacking,
        f"Not aligned yet: {text.listed(unaligned)}.": unaligned,
        "No model is distilled yet.": not facts.targets,
        f"Training has begun and is not finished: {text.listed(facts.training)}.": facts.training,
        "The recipe has no merge: the distilled models are the result.": not merges,
        "The distilled models are not merged yet.": merges and facts.merged is None,
        "The recipe has no evaluation.": not evaluates,
        "Nothing is evaluated yet.": evaluates and facts.results is None,
    }
    return [line for line, applies in said.items() if applies]


def model_rows(facts: Facts) -> list[dict[str, Any]]:
    """The pivot and the sources. template: where the chat template comes from, and its date."""
    rows = []
    for name, entry in facts.entries.items():
        details = facts.stores[name].spec.details if name in facts.stores else {}
        template = str(details.get("chat_template") or entry.get("chat_template") or "own")
        template += f" ({details['date']})" if details.get("date") else ""
        known = facts.models.get(name) or ModelFacts(model=facts.model_name(name))
        rows.append({"name": name, "known": known, "template": template})
    return rows


def teachers(record: Training) -> list[dict[str, Any]]:
    """Who taught a distilled model: ``rows`` that training read in all epochs, and the ``shares`` of each candidate."""
    fusion, rows = record.settings.get("fusion"), record.counts.get("rows", 0.0)
    pivot = [PIVOT] if not isinstance(fusion, dict) or fusion.get("include_pivot", True) else []
    shares = {name: record.counts.get(CHOSEN + name, 0.0) / max(rows, 1.0) for name in [*pivot, *record.sources]}
    return [{"rows": rows, "shares": shares}] if rows else []


def training_rows(facts: Facts) -> list[dict[str, Any]]:
    """The distilled models and plain fine-tuning, with the last values of their logs. linked, taught: shares."""
    rows = []
    for place, record in facts.trained.items():
        counts, known = record.counts, facts.artifacts.get(place)
        labels, asked = counts.get("labels", 0.0), counts.get("asked", 0.0)
        seconds = _seconds(known.made) if known is not None else None
        rows.append(
            {
                "name": BASELINE if place == BASELINE_PLACE else place,
                "record": record,
                "linked": counts.get("linked", 0.0) / asked if asked else None,
                "taught": counts.get("taught", 0.0) / labels if labels and asked else None,
                "seconds": record.last("train_runtime") if seconds is None else seconds,
            }
        )
    return rows


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
    for place, record in facts.trained.items():
        where = f"training of {'plain fine-tuning' if place == BASELINE_PLACE else place.removeprefix('targets/')}"
        for model, keys in record.unmatched.items():
            add(
                where,
                len(keys),
                f"not among the examples captured from {model}; trained without its teaching",
                True,
                keys,
            )
        if record.skipped_steps:
            add(where, record.skipped_steps, "optimizer steps whose loss or gradient was non-finite", False)
    return found


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def given_text(recipe: Mapping[str, Any]) -> str:
    """The values that are not the defaults, as YAML; empty where this version cannot read the recipe."""
    try:
        return recipe_text(Recipe.model_validate(recipe).model_dump(mode="json", exclude_defaults=True))
    except ValidationError:
        return ""


def made(facts: Facts) -> list[dict[str, Any]]:
    """Every artifact, in the order of the stages: what made it, what it holds, its hash, seconds and circumstances."""
    found = {place: _artifact(place, known) for place, known in facts.artifacts.items()}
    stores = [_store(facts, name) for name in (PIVOT, *facts.sources) if name in facts.stores]
    data = [one for one in found.values() if one["stage"] == "data"]
    return data + stores + [one for one in found.values() if one["stage"] != "data"]


def _artifact(place: str, known: Artifact) -> dict[str, Any]:
    # The card is left out: it is written when everything else is known.
    content = joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items() if name != CARD)
    size = human(sum(file.size for file in known.files.values()))
    return _made(place, known.stage, f"{counted(len(known.files), 'file')}, {size}", content, known.made)


def _store(facts: Facts, name: str) -> dict[str, Any]:
    store, times = facts.stores[name], facts.captures.get(name, {})
    size = human(sum(record.size for record in store.records))
    holds = f"{counted(len(store), 'example')} in {counted(len(store.records), 'shard')}, {size}"
    content = joined_hash(record.xxh3 for record in store.records)
    if not any(isinstance(value, str) for value in times.values()):
        times = {str(k): str(v) for k, v in store.manifest.made.items()} | {"seconds": times.get("seconds")}
    return _made(f"captures/{name}", "capture", holds, content, times)


def _made(place: str, stage: str, holds: str, content: str, circumstances: Mapping[str, Any]) -> dict[str, Any]:
    strings = {str(name): value for name, value in circumstances.items() if isinstance(value, str)}
    one = {"place": place, "stage": stage, "holds": holds, "content": content}
    return one | {"seconds": _seconds(circumstances), "circumstances": strings}


def _seconds(values: Mapping[str, Any]) -> float | None:
    value = values.get("seconds")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _circumstances(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Hosts and versions of all artifacts; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for one in artifacts:
        for name, value in one["circumstances"].items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _times(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per stage, and of all stages."""
    found: dict[str, float] = {}
    for one in artifacts:
        if one["seconds"] is not None:
            found[one["stage"]] = found.get(one["stage"], 0.0) + one["seconds"]
    return found | ({"all stages": sum(found.values())} if len(found) > 1 else {})


def identities(facts: Facts) -> list[dict[str, str]]:
    """What identifies the pivot and the sources, as their captures recorded it: weights, and how they read text."""
    return [
        {"name": name, "model": facts.model_name(name), "weights": spec.model_fingerprint, "tokenizer": spec.tokenizer}
        for name in (PIVOT, *facts.sources)
        if name in facts.stores
        for spec in [facts.stores[name].spec]
    ]


Drawing = dict[str, Any]

# ---- the recipe as a graph

_WIDE, _HIGH = 206, 74  # of a box
_ACROSS, _DOWN, _MARGIN, _HEAD = 66, 18, 8, 26
_CHARACTERS = 27  # that fit into a line of a box


def recipe_graph(facts: Facts, colour: Mapping[str, str]) -> Drawing:
    """Models, captures, distilled models and the merged one as columns of boxes with curves between them.

    missing: what does not exist yet. heads: of the columns, with their x. path: of an SVG. colour: class by name.
    """
    names = [PIVOT, *facts.sources]
    joint = facts.value("fusion.mode") == "joint"
    targets = list(facts.targets) or (["joint"] if joint else list(facts.sources))
    targets += [name for name in facts.training if name not in targets]
    links = [(f"model {name}", f"store {name}") for name in names]
    for target in targets:
        record = facts.targets.get(target)
        teachers = list(record.sources) if record else (facts.sources if target not in facts.sources else [target])
        links += [(f"store {name}", f"target {target}") for name in [PIVOT, *teachers]]
        links.append((f"target {target}", "merged"))
    columns = {
        "models": {f"model {name}": _model_box(facts, name, colour[name]) for name in names},
        "captures": {f"store {name}": _store_box(facts, name, colour[name]) for name in names},
        "distilled models": {f"target {name}": _target_box(facts, name, colour.get(name, "c1")) for name in targets},
    }
    if facts.value("merge") is not None:
        done = facts.merged is not None
        lines = ["merged model" if done else "not merged yet", f"by {facts.value('merge.merge_method') or ''}"]
        columns["result"] = {"merged": _box(lines, "cm", not done)}
    rows = max(map(len, columns.values()))
    heads = []
    for number, (head, boxes) in enumerate(columns.items()):
        x = _MARGIN + number * (_WIDE + _ACROSS)
        heads.append((x + _WIDE / 2, head))
        free = (rows - len(boxes)) * (_HIGH + _DOWN) / 2
        for at, box in enumerate(boxes.values()):
            box.update(x=x, y=_HEAD + _MARGIN + free + at * (_HIGH + _DOWN))
    placed = {key: box for boxes in columns.values() for key, box in boxes.items()}
    return {
        "width": 2 * _MARGIN + len(columns) * (_WIDE + _ACROSS) - _ACROSS,
        "height": _HEAD + rows * (_HIGH + _DOWN) - _DOWN + 2 * _MARGIN,
        "heads": heads,
        "boxes": list(placed.values()),
        "edges": [_edge(placed[a], placed[b]) for a, b in links if a in placed and b in placed],
        "box_width": _WIDE,
        "box_height": _HIGH,
    }


def _edge(a: Drawing, b: Drawing) -> Drawing:
    x1, y1 = a["x"] + _WIDE, a["y"] + _HIGH / 2
    x2, y2 = b["x"] - 5, b["y"] + _HIGH / 2  # the arrow's head takes the rest
    middle = (x1 + x2) / 2
    path = f"M{x1:g} {y1:g}C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"
    return {"path": path, "colour": a["colour"], "missing": a["missing"] or b["missing"]}


def _box(lines: list[str], colour: str, missing: bool = False) -> Drawing:
    shown = [text.shorten(text.name(line), _CHARACTERS) for line in lines if line]
    return {"lines": shown, "colour": colour, "missing": missing}


def _model_box(facts: Facts, name: str, colour: str) -> Drawing:
    known = facts.models.get(name)
    if known is None:
        return _box([name, facts.model_name(name)], colour)
    size = f"{text.scaled(known.parameters)} parameters" if known.parameters else ""
    tokens = f"{known.tokenizer.tokens:,} tokens, {known.tokenizer.form}" if known.tokenizer else ""
    return _box([name, " · ".join(filter(None, (known.kind, size))), tokens], colour)


def _store_box(facts: Facts, name: str, colour: str) -> Drawing:
    store = facts.stores.get(name)
    if store is None:
        return _box(["not captured yet"], colour, missing=True)
    state = counted(len(store), "example") + ("" if store.complete else " so far")
    size = human(sum(record.size for record in store.records))
    return _box([f"top {store.spec.top_k} per token", f"{state}, {size}"], colour)


def _target_box(facts: Facts, name: str, colour: str) -> Drawing:
    record = facts.targets.get(name)
    if record is None:
        return _box([name, "in training" if name in facts.training else "not trained yet"], colour, missing=True)
    loss = record.last("loss")
    teachers = f"taught by {text.listed(record.sources)}" if record.sources else "from the text alone"
    return _box([name, teachers, f"last loss {fixed(loss, 2)}" if loss is not None else ""], colour)


# ---- loss curves

_FRAME = {"width": 560, "height": 300, "left": 56, "right": 534, "top": 14, "bottom": 256}
MOST_POINTS = 240  # of a curve; more cannot be told apart at this width

Points = Sequence[tuple[float, float]]


def loss_charts(facts: Facts, colour: Mapping[str, str]) -> list[Drawing]:
    """The loss on the text and the loss on the teachers by step, a curve per model."""
    records = [(name, colour.get(name, "c1"), record) for name, record in facts.targets.items()]
    if facts.baseline is not None:
        records.append(("plain fine-tuning", "cb", facts.baseline))
    on_text = [(name, c, record.points("lm_loss") or record.points("loss")) for name, c, record in records]
    taught = [(name, c, record.points("fusion_loss")) for name, c, record in records if record.sources]
    drawn = (
        chart("Loss on the text, nats per token", on_text),
        chart("Loss on the teachers' distributions, nats per token", taught),
    )
    return [found for found in drawn if found is not None]


def chart(title: str, series: Sequence[tuple[str, str, Points]]) -> Drawing | None:
    """Lay out curves over optimizer steps; None where no curve has two points.

    series: name, class of the colour, and points. Returns the frame, ticks of both axes (place and label), and of each
    curve its path, where it ends, and its first, least and last value.
    """
    series = [(name, colour, thinned(points)) for name, colour, points in series if len(points) > 1]
    if not series:
        return None
    every = [point for _, _, points in series for point in points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), 6)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 5)
    x_low, x_high = min(x_ticks[0], *(x for x, _ in every)), max(x for x, _ in every)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    left, right, top, bottom = (_FRAME[side] for side in ("left", "right", "top", "bottom"))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1) * (right - left) + left
        down = bottom - (y - y_low) / (y_high - y_low or 1) * (bottom - top)
        return round(across, 1), round(down, 1)

    curves = []
    for name, colour, points in series:
        at, values = [place(x, y) for x, y in points], [y for _, y in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in at)
        known = {"first": values[0], "least": min(values), "last": values[-1]}
        curves.append({"name": name, "colour": colour, "path": path, "end": at[-1], **known})
    x_labels = [(place(x, y_low)[0], label) for x, label in _labelled(x_ticks) if x <= x_high]
    y_labels = [(place(x_low, y)[1], label) for y, label in _labelled(y_ticks)]
    return {"title": title, "x": x_labels, "y": y_labels, "curves": curves, **_FRAME}


def ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers that enclose ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """With as many digits as tell all of them apart."""
    digits = next((n for n in range(10) if all(abs(round(v, n) - v) < 1e-9 for v in values)), 10)
    return [(value, fixed(value, digits)) for value in values]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS`, each the mean of its neighbours; the first and the last stay as they are."""
    inner = list(points[1:-1])
    if len(inner) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(inner) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    parts = [inner[start:stop] for start, stop in pairwise(edges) if stop > start]
    means = [(math.fsum(x for x, _ in p) / len(p), math.fsum(y for _, y in p) / len(p)) for p in parts]
    return [points[0], *means, points[-1]]


# ---- merge coefficients

_MODULES = ("attn", "attention", "mlp", "ffn", "feed_forward", "experts")  # as a token meets them; norms come last


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each model's path, or the whole path where two have the same."""
    last = {model: PurePath(model.rstrip("/")).name or model for model in models}
    taken = list(last.values())
    return {model: name if taken.count(name) == 1 else model for model, name in last.items()}


def heat_map(found: Coefficients | None, order: Sequence[str] = ()) -> Drawing | None:
    """Arrange coefficients; None where there are none.

    Args:
        found: of every tensor.
        order: of models, by their short names; others follow.

    Returns:
        ``layers`` and ``modules``, the rows and columns, with ``cells`` by both; ``outside``: cells of no layer. A cell
        has the tensors of one layer and module: their name, mean ``shares`` by model, and the mean share of
        elements that were ``selected``. ``equal``: the share of each model if all were alike; ``reach``: the largest
        distance from it. ``summaries``: each model's mean, least and greatest share over all tensors.
    """
    ids = sorted({model for tensor in found.tensors.values() for model in tensor.coefficients}) if found else []
    if found is None or not ids:
        return None
    names, tensors = short_names(ids), list(found.tensors.values())
    ids.sort(key=lambda model: order.index(names[model]) if names[model] in order else len(order))
    groups: dict[tuple[int | None, str], dict[str, Tensor]] = {}
    for name, tensor in found.tensors.items():
        groups.setdefault(_place(name), {})[name] = tensor
    cells = {place: _cell(*place, members, ids) for place, members in groups.items()}
    inside = {place: cell for place, cell in cells.items() if place[0] is not None}
    equal = 1 / len(ids)
    return {
        "models": [names[model] for model in ids],
        "layers": sorted({layer for layer, _ in inside if layer is not None}),
        "modules": sorted({module for _, module in inside}, key=_module_order),
        "cells": inside,
        "outside": sorted((c for place, c in cells.items() if place[0] is None), key=lambda cell: str(cell["name"])),
        "equal": equal,
        "reach": max((abs(s - equal) for cell in cells.values() for s in cell["shares"] if s is not None), default=0.0),
        "methods": sorted({tensor.method for tensor in tensors}),
        "tensors": len(tensors),
        "selected": _mean([tensor.selected for tensor in tensors]),
        "summaries": [{"model": names[model], **_summary(model, tensors)} for model in ids],
    }


def _place(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: ``model.layers.3.mlp.experts.7.w1.weight`` -> ``3, mlp.experts.*.w1``."""
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
    if at is None or at + 1 == len(parts):
        return None, ".".join(parts)
    return int(parts[at]), ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :])


def _cell(layer: int | None, module: str, members: Mapping[str, Tensor], ids: Sequence[str]) -> Drawing:
    return {
        "module": module,
        "name": next(iter(members)) if len(members) == 1 else f"{'' if layer is None else f'layer {layer}: '}{module}",
        "shares": [_mean([tensor.coefficients.get(model) for tensor in members.values()]) for model in ids],
        "selected": _mean([tensor.selected for tensor in members.values()]),
    }


def _summary(model: str, tensors: Sequence[Tensor]) -> dict[str, float | None]:
    values = [tensor.coefficients[model] for tensor in tensors if model in tensor.coefficients]
    erased = _mean([tensor.erased.get(model) for tensor in tensors if tensor.erased])
    return {"mean": math.fsum(values) / len(values), "least": min(values), "greatest": max(values), "erased": erased}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _module_order(module: str) -> tuple[int, str]:
    kind = next((i for i, word in enumerate(_MODULES) if word in module), len(_MODULES))
    return (len(_MODULES) + 1 if "norm" in module else kind, module)
