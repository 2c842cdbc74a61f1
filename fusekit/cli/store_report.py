"""What is in a store, as figures and as lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fusekit.artifacts import counted, human

if TYPE_CHECKING:
    from fusekit.capturing.store import Store
    from fusekit.types import CapturedRow

_SHOWN_QUARANTINED = 5
_SHOWN_ENTRIES = 3


def figures(store: Store) -> dict[str, Any]:
    """Plain types, for JSON."""
    summary, spec = store.summary, store.spec
    sources = {
        name: _share(store, np.flatnonzero(summary.dataset == number)) for number, name in enumerate(summary.datasets)
    }
    return {
        "path": str(store.path),
        "complete": store.complete,
        "made_from": spec.model_dump(),
        "total": _share(store, np.arange(len(store))),
        "datasets": sources,
        "shards": len(store.records),
        "file_bytes": sum(record.size for record in store.records),
        "quarantined": {row.key: row.reason for row in store.quarantined},
    }


def _share(store: Store, rows: Any) -> dict[str, Any]:
    summary = store.summary
    labels, content = int(summary.labels[rows].sum()), int(summary.bytes[rows].sum())
    nats = float(summary.cross_entropy[rows].sum())
    return {
        "rows": len(rows),
        "tokens": int(summary.tokens[rows].sum()),
        "labels": labels,
        "content_bytes": content,
        "cross_entropy_per_label": nats / max(labels, 1),
        "bits_per_byte": nats / math.log(2) / max(content, 1),
    }


def summary_lines(store: Store) -> Iterator[str]:
    """A page about a store."""
    found, spec = figures(store), store.spec
    state = "complete" if store.complete else "not finished; the same command resumes it"
    yield f"{store.path}: {state}"
    mass = f", until they hold {spec.keep_mass:g}" if spec.keep_mass else ""
    yield f"  model        {spec.model} ({spec.model_fingerprint})"
    yield f"  rows kept    up to {spec.top_k} of {spec.vocabulary} ids{mass}, temperature {spec.temperature:g}"
    bound = f"rounded by at most {spec.max_error:g} nats" if spec.max_error else "float32"
    yield f"  values       {bound}"
    per_label = found["file_bytes"] / max(found["total"]["labels"], 1)
    shards = counted(found["shards"], "shard")
    yield f"  on disk      {human(found['file_bytes'])} in {shards}, {per_label:.1f} bytes per label"
    yield ""
    width = max(len(name) for name in ("all", *found["datasets"]))
    head = f"{'examples':>8} {'tokens':>10} {'labels':>10} {'nats/label':>10} {'bits/byte':>9}"
    yield f"  {'':<{width}}  {head}"
    for name, share in [*found["datasets"].items(), ("all", found["total"])]:
        yield (
            f"  {name:<{width}}  {share['rows']:>8} {share['tokens']:>10} {share['labels']:>10} "
            f"{share['cross_entropy_per_label']:>10.4f} {share['bits_per_byte']:>9.4f}"
        )
    if found["quarantined"]:
        yield ""
        yield f"  {counted(len(found['quarantined']), 'example')} without a distribution:"
        for key, reason in list(found["quarantined"].items())[:_SHOWN_QUARANTINED]:
            yield f"    {key}  {reason}"


def row_lines(row: CapturedRow, tokenizer: Any, most: int) -> Iterator[str]:
    """A row as people read it: its text, then ``most`` labels with what the model expected there.

    tokenizer: of the model, to turn ids into strings.
    """
    tokens = row.tokens
    yield f"row {tokens.key} ({row.dataset or 'no dataset'})"
    size = f"{counted(len(tokens), 'token')}, {counted(len(row.actual), 'label')}"
    yield f"  {size}, {row.token_ce:.4f} nats per label, {row.bits_per_byte:.4f} bits per byte"
    yield f"  {_shown(tokenizer.decode(tokens.ids.tolist()), 600)}"
    positions = tokens.label_positions.tolist()
    for j, position in enumerate(positions[:most]):
        expected = [
            f"{_token(tokenizer, int(id_))} {math.exp(logprob):.3f}"
            for id_, logprob in zip(row.rows.ids[j], row.rows.logprobs[j], strict=True)
            if id_ >= 0
        ]
        yield (
            f"  {position:>6} {_token(tokenizer, int(tokens.ids[position])):<16} {math.exp(row.actual[j]):.3f}   "
            f"{', '.join(expected[:_SHOWN_ENTRIES])}; the rest {_rest(row, j):.3f}"
        )
    if len(positions) > most:
        yield f"  ... and {len(positions) - most} labels more"


def _rest(row: CapturedRow, j: int) -> float:
    """What is not in the entries that are shown."""
    shown = row.rows.ids[j, :_SHOWN_ENTRIES] >= 0
    return max(1.0 - float(np.exp(row.rows.logprobs[j, :_SHOWN_ENTRIES][shown]).sum()), 0.0)


def _token(tokenizer: Any, id_: int) -> str:
    return _shown(repr(tokenizer.decode([id_])), 24)


def _shown(text: str, most: int) -> str:
    # Control characters of somebody's data do not reach the terminal.
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return safe if len(safe) <= most else f"{safe[: most - 3]}..."
