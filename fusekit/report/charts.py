"""Drawings of the report as the numbers that an SVG needs: the recipe as a graph, loss curves, and the heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from fusekit.disk import counted, human
from fusekit.evaluation.table import fixed
from fusekit.layout import PIVOT
from fusekit.report import text
from fusekit.report.facts import Coefficients, Facts, Tensor

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
