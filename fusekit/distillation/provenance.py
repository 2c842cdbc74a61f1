"""What a run is made from, as flat facts that two runs can be compared by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from fusekit import artifacts as artifact
from fusekit.capturing.store import Store
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import AlignmentSettings, DistillSettings
from fusekit.distillation.vocabulary_maps import map_hash
from fusekit.types import Row

Facts = dict[str, Any]

# How the work is split, watched and kept does not change what comes out.
_FREE = {"per_device_train_batch_size", "activation_checkpointing", "max_skipped_steps"}
# Of a loss that plain fine-tuning has not.
_OF_FUSION = {"loss", "truncation", "temperature"}
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
    stores: Mapping[str, Store | LiveTeacher],
    *,
    projections: Mapping[str, Projection] | None = None,
    writers: Mapping[str, str] | None = None,
) -> Facts:
    """Everything that decides the weights of a target, and nothing else.

    What a target does not use is not among them: of plain fine-tuning how sources are fused, of ``dtw`` what only
    ``span`` reads. How sources are aligned is stated for each of them, in ``projections``.

    Args:
        target: its name.
        settings: of the run.
        pivot: fingerprint of the pivot's weights.
        rows: to train on, in order.
        stores: captured rows by name.
        projections: how each source's rows come into the pivot's vocabulary; a source may have settings of its own.
        writers: of a schedule, the models that wrote the answers, by key, in order.
    """
    unused = _FREE | (_OF_FUSION if settings.plain else set())
    training = settings.training.model_dump(mode="json", exclude=unused)
    training = {name: value for name, value in training.items() if not name.startswith(_FREE_FIELDS)}
    if not settings.training.on_policy:
        del training["on_policy"], training["max_new_tokens"]
    if settings.training.schedule is None:
        del training["schedule"]
    else:
        del training["num_train_epochs"]
    nested: dict[str, Any] = {
        "target": target,
        "pivot": pivot,
        "rows": {"count": len(rows), "xxh3": _digest(row.key for row in rows)},
        **({} if writers is None else {"responses": _digest(f"{key} {name}" for key, name in writers.items())}),
        **({} if settings.plain else {"fusion": settings.fusion.model_dump(mode="json")}),
        "training": training,
        "stores": {name: _store(store) for name, store in stores.items()},
        "projections": {name: _projection(how) for name, how in (projections or {}).items()},
    }
    return artifact.flat(nested)


def facts_of_alignment(how: AlignmentSettings) -> Facts:
    """What of the facts of a source's projection follows from its settings alone; no map has to be made for it."""
    if how.as_they_are:
        return {"vocabulary": how.vocabulary}
    facts: Facts = {"tokens": how.tokens, "vocabulary": how.vocabulary, "collisions": how.collisions}
    return (
        facts
        if how.tokens == "dtw"
        else facts | {"conditioning": how.conditioning, "tail": how.tail, "one_hot": how.one_hot}
    )


def _store(store: Store | LiveTeacher) -> dict[str, Any]:
    return {**store.spec.model_dump(mode="json"), "shards": _digest(record.xxh3 for record in store.records)}


def _projection(how: Projection) -> dict[str, Any]:
    if how.vocabulary_map is None:
        return {"vocabulary": "none"}
    if not how.into_pivot:
        return {"vocabulary": how.tokens, "xxh3": map_hash(how.vocabulary_map)}
    grouped = how.tokens == "grouped"
    facts: Facts = {
        "tokens": "span" if grouped else how.tokens,
        "vocabulary": "grouped" if grouped else how.vocabulary_map.method,
        "collisions": how.collisions,
        "xxh3": map_hash(how.vocabulary_map),
    }
    return (
        facts
        if how.tokens == "dtw"
        else facts | {"conditioning": how.conditioning, "tail": how.tail, "one_hot": how.one_hot}
    )


def _digest(lines: Iterable[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
