"""A slow reader of shards, written from docs/store.md: one number at a time, of what any reader of Parquet gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def logprob(depth: int, step: float) -> float:
    """The grid point of a depth."""
    knee = 6 / step
    if depth <= knee:
        return 2 * math.log(1 - depth * step / 8)
    return -2 * math.log(4) - (depth - knee) * step


def error_bound(value: float, max_error: float) -> float:
    """How far a decoded log-probability can be from the one given: half a step of the grid, and the normalisation."""
    if not max_error:
        return abs(value) * 2**-24
    knee = -2 * math.log(4)
    depth = (1 - math.exp(max(value, knee) / 2)) * 8 / max_error - (min(value, knee) - knee) / max_error
    return value - logprob(depth + 0.5, max_error) + max_error / 2


def read(path: Path, max_error: float) -> list[dict[str, Any]]:
    """The examples of a shard: scalars and token columns as they are; ``rows`` of (id, log-probability), ``tail`` and
    ``actual`` for each label."""
    import pyarrow.parquet as pq

    return [decode(record, max_error) for record in pq.read_table(path).to_pylist()]


def decode(record: dict[str, Any], max_error: float) -> dict[str, Any]:
    row = dict(record)
    row["lows"] = record["lows"] or record["ends"]
    labels = [id_ for id_, is_label in zip(record["token_ids"], record["is_label"], strict=True) if is_label]
    row["rows"], row["actual"] = [], []
    row["tail"] = list(record["tail"]) if not max_error else []
    at = 0
    for label, count in enumerate(record["entries"]):
        id_, entries = -1, []
        for place in range(at, at + count):
            id_ += record["id_gaps"][place] + 1
            value = logprob(record["depths"][place], max_error) if max_error else record["logprobs"][place]
            entries.append((-value, id_))
        entries.sort()
        at += count
        if not max_error:
            row["rows"].append([(id_, -value) for value, id_ in entries])
            row["actual"].append(record["label_logprob"][label])
            continue
        depth = record["tail_depth"][label]
        tail = 0.0 if depth < 0 else math.exp(logprob(depth, max_error))
        mass = sum(math.exp(-value) for value, _ in entries) + tail
        actual = logprob(record["label_depth"][label], max_error)
        if (-actual, labels[label]) in entries:
            actual -= math.log(mass)
        row["rows"].append([(id_, -value - math.log(mass)) for value, id_ in entries])
        row["tail"].append(tail / mass)
        row["actual"].append(actual)
    return row
