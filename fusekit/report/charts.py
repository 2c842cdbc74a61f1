"""Drawings of the report as the numbers that an SVG needs: the recipe as a graph, loss curves, and the heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import NamedTuple

from fusekit.artifacts import counted, human
from fusekit.evaluation.table import fixed
from fusekit.layout import PIVOT
from fusekit.report import text
from fusekit.report.facts import Coefficients, Facts, Tensor

# ---- the recipe as a graph

BOX_WIDTH, BOX_HEIGHT = 206, 74
_ACROSS, _DOWN, _MARGIN, _HEAD = 66, 18, 8, 26
_CHARACTERS = 27  # that fit into a line of a box


class Box(NamedTuple):
    """A box at its place. lines: its text, the first one large. colour: a class. missing: does not exist yet."""

    lines: list[str]
    colour: str
    missing: bool
    x: float = 0
    y: float = 0


class Edge(NamedTuple):
    """A curve between two boxes. path: of an SVG."""

    path: str
    colour: str
    missing: bool


class Graph(NamedTuple):
    """Columns of boxes from left to right, and curves between them. heads: of the columns, with their x."""

    width: int
    height: int
    heads: list[tuple[float, str]]
    boxes: list[Box]
    edges: list[Edge]
    box_width: int = BOX_WIDTH
    box_height: int = BOX_HEIGHT


def recipe_graph(facts: Facts, colour: Mapping[str, str]) -> Graph:
    """Models, captures, targets and the merged model; also what does not exist yet. colour: class by name."""
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
    columns = [
        ("models", {f"model {name}": _model_box(facts, name, colour[name]) for name in names}),
        ("captures", {f"store {name}": _store_box(facts, name, colour[name]) for name in names}),
        ("targets", {f"target {name}": _target_box(facts, name, colour.get(name, "c1")) for name in targets}),
    ]
    if facts.value("merge") is not None:
        method, done = str(facts.value("merge.merge_method") or ""), facts.merged is not None
        merged = _box(["merged model" if done else "not merged yet", f"by {method}"], "cm", not done)
        columns.append(("result", {"merged": merged}))
    return _laid_out(columns, links)


def _laid_out(columns: Sequence[tuple[str, Mapping[str, Box]]], links: Sequence[tuple[str, str]]) -> Graph:
    """Place columns of boxes, centred, each with a head, and the links between them by their keys."""
    rows = max(len(boxes) for _, boxes in columns)
    placed: dict[str, Box] = {}
    heads = []
    for number, (head, boxes) in enumerate(columns):
        x = _MARGIN + number * (BOX_WIDTH + _ACROSS)
        heads.append((x + BOX_WIDTH / 2, head))
        free = (rows - len(boxes)) * (BOX_HEIGHT + _DOWN) / 2
        for at, (key, box) in enumerate(boxes.items()):
            placed[key] = box._replace(x=x, y=_HEAD + _MARGIN + free + at * (BOX_HEIGHT + _DOWN))
    width = 2 * _MARGIN + len(columns) * (BOX_WIDTH + _ACROSS) - _ACROSS
    height = _HEAD + rows * (BOX_HEIGHT + _DOWN) - _DOWN + 2 * _MARGIN
    edges = [_edge(placed[a], placed[b]) for a, b in links if a in placed and b in placed]
    return Graph(width, height, heads, list(placed.values()), edges)


def _edge(a: Box, b: Box) -> Edge:
    x1, y1 = a.x + BOX_WIDTH, a.y + BOX_HEIGHT / 2
    x2, y2 = b.x - 5, b.y + BOX_HEIGHT / 2  # the arrow's head takes the rest
    middle = (x1 + x2) / 2
    path = f"M{x1:g} {y1:g}C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"
    return Edge(path, a.colour, a.missing or b.missing)


def _box(lines: list[str], colour: str, missing: bool = False) -> Box:
    return Box([text.shorten(text.name(line), _CHARACTERS) for line in lines if line], colour, missing)


def _model_box(facts: Facts, name: str, colour: str) -> Box:
    known = facts.models.get(name)
    if known is None:
        return _box([name, facts.model_name(name)], colour)
    size = f"{text.scaled(known.parameters)} parameters" if known.parameters else ""
    tokens = f"{known.tokenizer.tokens:,} tokens, {known.tokenizer.form}" if known.tokenizer else ""
    kind = (known.architecture or "").removesuffix("ForCausalLM")
    return _box([name, " · ".join(filter(None, (kind, size))), tokens], colour)


def _store_box(facts: Facts, name: str, colour: str) -> Box:
    store = facts.stores.get(name)
    if store is None:
        return _box(["not captured yet"], colour, missing=True)
    state = counted(len(store), "example") + ("" if store.complete else " so far")
    size = human(sum(record.size for record in store.records))
    return _box([f"top {store.spec.top_k} per token", f"{state}, {size}"], colour)


def _target_box(facts: Facts, name: str, colour: str) -> Box:
    record = facts.targets.get(name)
    if record is None:
        return _box([name, "in training" if name in facts.training else "not trained yet"], colour, missing=True)
    loss = record.last("loss")
    teachers = f"taught by {text.listed(record.sources)}" if record.sources else "from the text alone"
    return _box([name, teachers, f"last loss {fixed(loss, 2)}" if loss is not None else ""], colour)


# ---- loss curves

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 26, 14, 44
MOST_POINTS = 240  # of a curve; more cannot be told apart at this width

Points = Sequence[tuple[float, float]]


class Tick(NamedTuple):
    """A mark on an axis: where, in pixels, and its label."""

    at: float
    label: str


class Curve(NamedTuple):
    """A model's line. colour: its class. path: of an SVG, which ends at ``end``. first, least, last: values."""

    name: str
    colour: str
    path: str
    end: tuple[float, float]
    first: float
    least: float
    last: float


class Chart(NamedTuple):
    """Curves over optimizer steps. x, y: ticks."""

    title: str
    x: list[Tick]
    y: list[Tick]
    curves: list[Curve]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


def loss_charts(facts: Facts, colour: Mapping[str, str]) -> list[Chart]:
    """The loss on the text and the loss on the teachers by step, a curve per model."""
    records = {name: (record, colour.get(name, "c1")) for name, record in facts.targets.items()}
    if facts.baseline is not None:
        records["plain fine-tuning"] = (facts.baseline, "cb")
    on_text = [(name, c, record.points("lm_loss") or record.points("loss")) for name, (record, c) in records.items()]
    taught = [(name, c, record.points("fusion_loss")) for name, (record, c) in records.items() if record.sources]
    made = [
        chart("Loss on the text, nats per token", on_text),
        chart("Loss on the teachers' distributions, nats per token", taught),
    ]
    return [found for found in made if found is not None]


def chart(title: str, series: Sequence[tuple[str, str, Points]]) -> Chart | None:
    """Lay out curves: name, class of their colour, and points. None where no curve has two points."""
    series = [(name, colour, thinned(points)) for name, colour, points in series if len(points) > 1]
    if not series:
        return None
    every = [point for _, _, points in series for point in points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), 6)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 5)
    x_low, x_high = min(x_ticks[0], *(x for x, _ in every)), max(x for x, _ in every)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1) * (_WIDTH - _LEFT - _RIGHT) + _LEFT
        down = _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    curves = []
    for name, colour, points in series:
        at, values = [place(x, y) for x, y in points], [y for _, y in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in at)
        curves.append(Curve(name, colour, path, at[-1], values[0], min(values), values[-1]))
    return Chart(
        title,
        [Tick(place(x, y_low)[0], label) for x, label in zip(x_ticks, _labels(x_ticks), strict=True) if x <= x_high],
        [Tick(place(x_low, y)[1], label) for y, label in zip(y_ticks, _labels(y_ticks), strict=True)],
        curves,
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers that enclose ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def _labels(values: Sequence[float]) -> list[str]:
    """With as many digits as tell all of them apart."""
    digits = next((n for n in range(10) if all(abs(round(v, n) - v) < 1e-9 for v in values)), 10)
    return [fixed(value, digits) for value in values]


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

_STRONGEST = 0.85  # opacity of the largest distance from equal shares
_MODULES = ("attn", "attention", "mlp", "ffn", "feed_forward", "experts")  # as a token meets them; norms come last


class Cell(NamedTuple):
    """Tensors of one layer and module.

    name: the tensor's, with ``*`` for the numbers that differ where there are several. tensors: how many there are.
    shares: their mean coefficient by model. selected: mean share of their elements that were selected.
    """

    layer: int | None
    module: str
    name: str
    tensors: int
    shares: list[float | None]
    selected: float | None


class Summary(NamedTuple):
    """A model's coefficients over all tensors."""

    model: str
    mean: float
    least: float
    greatest: float
    erased: float | None


@dataclass(frozen=True)
class HeatMap:
    """All coefficients.

    Attributes:
        models: names of the merged models, in order.
        layers, modules: rows and columns of the map; cells: by both. outside: tensors of no layer.
        equal: the share of each model if all were alike. reach: the largest distance from it.
        methods, tensors, selected: the merge's methods, number of tensors, and share of selected elements.
    """

    models: list[str]
    layers: list[int]
    modules: list[str]
    cells: dict[tuple[int, str], Cell]
    outside: list[Cell]
    equal: float
    reach: float
    methods: list[str]
    tensors: int
    selected: float | None
    summaries: list[Summary]

    def opacity(self, share: float) -> float:
        """How strongly a share is coloured: by its distance from equal shares."""
        return _STRONGEST * abs(share - self.equal) / self.reach if self.reach else 0.0


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each model's path, or the whole path where two have the same."""
    last = {model: PurePath(model.rstrip("/")).name or model for model in models}
    taken = list(last.values())
    return {model: name if taken.count(name) == 1 else model for model, name in last.items()}


def heat_map(found: Coefficients | None, order: Sequence[str] = ()) -> HeatMap | None:
    """Arrange coefficients; None where there are none. order: of models, by their short names; others follow."""
    ids = sorted({model for tensor in found.tensors.values() for model in tensor.coefficients}) if found else []
    if found is None or not ids:
        return None
    names = short_names(ids)
    ids.sort(key=lambda model: order.index(names[model]) if names[model] in order else len(order))
    groups: dict[tuple[int | None, str], list[tuple[str, Tensor]]] = {}
    for name, tensor in found.tensors.items():
        groups.setdefault(_place(name), []).append((name, tensor))
    cells = [_cell(layer, module, members, ids) for (layer, module), members in groups.items()]
    inside = {(cell.layer, cell.module): cell for cell in cells if cell.layer is not None}
    equal = 1 / len(ids)
    return HeatMap(
        models=[names[model] for model in ids],
        layers=sorted({layer for layer, _ in inside}),
        modules=sorted({module for _, module in inside}, key=_module_order),
        cells=inside,
        outside=sorted((cell for cell in cells if cell.layer is None), key=lambda cell: cell.name),
        equal=equal,
        reach=max((abs(s - equal) for cell in cells for s in cell.shares if s is not None), default=0.0),
        methods=sorted({tensor.method for tensor in found.tensors.values()}),
        tensors=len(found.tensors),
        selected=_mean([tensor.selected for tensor in found.tensors.values()]),
        summaries=[_summary(model, names[model], found) for model in ids],
    )


def _place(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: ``model.layers.3.mlp.experts.7.w1.weight`` -> ``3, mlp.experts.*.w1``."""
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
    if at is None or at + 1 == len(parts):
        return None, ".".join(parts)
    return int(parts[at]), ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :])


def _cell(layer: int | None, module: str, members: Sequence[tuple[str, Tensor]], ids: Sequence[str]) -> Cell:
    shares = [_mean([tensor.coefficients.get(model) for _, tensor in members]) for model in ids]
    name = members[0][0] if len(members) == 1 else f"{'' if layer is None else f'layer {layer}: '}{module}"
    return Cell(layer, module, name, len(members), shares, _mean([tensor.selected for _, tensor in members]))


def _summary(model: str, name: str, found: Coefficients) -> Summary:
    values = [tensor.coefficients[model] for tensor in found.tensors.values() if model in tensor.coefficients]
    erased = [tensor.erased.get(model) for tensor in found.tensors.values() if tensor.erased]
    return Summary(name, math.fsum(values) / len(values), min(values), max(values), _mean(erased))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _module_order(module: str) -> tuple[int, str]:
    kind = next((i for i, word in enumerate(_MODULES) if word in module), len(_MODULES))
    return (len(_MODULES) + 1 if "norm" in module else kind, module)
