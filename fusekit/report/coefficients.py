"""Merge coefficients, by layer and module: for a heat map, a table and the model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from fusekit.report.records import Coefficients, Tensor

OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Cell:
    """Tensors of one layer and module. shares: a coefficient per model, their mean over ``tensors`` tensors.

    name: of the tensor, with ``*`` for the numbers that differ where it stands for several.
    """

    layer: int | None
    module: str
    name: str
    tensors: int
    shares: list[float | None]
    selected: float | None


@dataclass(frozen=True)
class Summary:
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
        models: what the report calls the merged models, in order.
        layers, modules: rows and columns of the map.
        cells: by layer and module; outside: those of no layer.
        equal: the share that each model would have if all were alike.
        reach: the largest distance from it.
        method, parameters, tensors, selected: of the merge.
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


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What the report calls merged models: the last part of their path, or all of it where two have the same."""
    last = {model: PurePath(model.rstrip("/")).name or model for model in models}
    taken = list(last.values())
    return {model: name if taken.count(name) == 1 else model for model, name in last.items()}


def heat_map(found: Coefficients, order: Sequence[str] = ()) -> HeatMap | None:
    """Arrange coefficients; None where there are none. order: of models, by their short names; others follow."""
    ids = sorted({model for tensor in found.tensors.values() for model in tensor.coefficients})
    if not ids:
        return None
    names = short_names(ids)
    ids.sort(key=lambda model: order.index(names[model]) if names[model] in order else len(order))
    groups: dict[tuple[int | None, str], list[tuple[str, Tensor]]] = {}
    for name, tensor in found.tensors.items():
        groups.setdefault(_place(name), []).append((name, tensor))
    cells = [_cell(layer, module, members, ids) for (layer, module), members in groups.items()]
    inside = {(c.layer, c.module): c for c in cells if c.layer is not None}
    shares = [share for cell in cells for share in cell.shares if share is not None]
    equal = 1 / len(ids)
    return HeatMap(
        models=[names[model] for model in ids],
        layers=sorted({layer for layer, _ in inside}),
        modules=sorted({module for _, module in inside}, key=_module_order),
        cells=inside,
        outside=sorted((cell for cell in cells if cell.layer is None), key=lambda cell: cell.name),
        equal=equal,
        reach=max((abs(share - equal) for share in shares), default=0.0),
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
    """Attention before the feed-forward part, norms last, as a token meets them; the rest by name."""
    order = ("attn", "attention", "mlp", "ffn", "feed_forward", "experts")
    kind = next((i for i, word in enumerate(order) if word in module), len(order))
    return (len(order) + 1 if "norm" in module else kind, module)
