"""What a run is made from, as flat facts that two runs can be compared by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from fusekit.distillation.label_rows import Projection
from fusekit.distillation.settings import AlignmentSettings, DistillSettings
from fusekit.representation.rows import Row
from fusekit.storage.store import Store

Facts = dict[str, Any]

# How the work is split, watched and kept does not change what comes out.
_FREE = {"micro_batch_size", "workers", "activation_checkpointing", "max_skipped_steps"}
_FREE_FIELDS = (
    "logging_",
    "save_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_p",  # pinning, prefetching, persistent workers; not drop_last, which leaves rows out
    "log_level",
    "ddp_",
    "push_",
)


def facts_of_run(
    target: str,
    settings: DistillSettings,
    pivot: str,
    rows: Sequence[Row],
    stores: Mapping[str, Store],
    *,
    projections: Mapping[str, Projection | AlignmentSettings] | None = None,
) -> Facts:
    """Everything that decides the weights of a target.

    Args:
        target: its name.
        settings: of the run.
        pivot: fingerprint of the pivot's weights.
        rows: to train on, in order.
        stores: captured rows by name.
        projections: how each source's rows come into the pivot's vocabulary; a source may have settings of its own.
            Settings say the same without a vocabulary map.
    """
    training = settings.training.model_dump(mode="json", exclude=_FREE)
    training["trainer"] = {k: v for k, v in training["trainer"].items() if not k.startswith(_FREE_FIELDS)}
    nested: dict[str, Any] = {
        "target": target,
        "pivot": pivot,
        "rows": {"count": len(rows), "xxh3": _digest(row.key for row in rows)},
        "alignment": settings.alignment.model_dump(mode="json"),
        "fusion": settings.fusion.model_dump(mode="json"),
        "training": training,
        "stores": {name: _store(store) for name, store in stores.items()},
        "projections": {name: _projection(how) for name, how in (projections or {}).items()},
    }
    return dict(_flat("", nested))


def _store(store: Store) -> dict[str, Any]:
    return {**store.spec.model_dump(mode="json"), "shards": _digest(record.xxh3 for record in store.records)}


def _projection(how: Projection | AlignmentSettings) -> dict[str, Any]:
    if isinstance(how, Projection):
        vocabulary = how.vocabulary_map.method if how.vocabulary_map is not None else "none"
    else:
        vocabulary = how.vocabulary
    return {
        "tokens": how.tokens,
        "vocabulary": vocabulary,
        "conditioning": how.conditioning,
        "one_hot": how.one_hot,
        "collisions": how.collisions,
    }


def _digest(lines: Iterable[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else str(key), inner)]


def differences(before: Facts, now: Facts) -> list[str]:
    """One line per fact that differs: ``training.learning_rate: 1e-05, now 2e-05``."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {_shown(before, name)}, now {_shown(now, name)}"
        for name in names
        if name not in before or name not in now or _plain(before[name]) != _plain(now[name])
    ]


def _shown(facts: Facts, name: str) -> str:
    return repr(facts[name]) if name in facts else "not given"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
