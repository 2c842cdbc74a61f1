"""Where everything of a run came from: hashes, versions, hosts and times, from the manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusekit.artifacts import Artifact, human, joined_hash
from fusekit.pipeline.layout import PIVOT
from fusekit.report import text
from fusekit.report.facts import Facts
from fusekit.report.records import Training

CARD = "README.md"
BASELINE_PLACE = "baselines/sft"


@dataclass(frozen=True)
class Made:
    """An artifact. place: in the folder of the run. content: hash of its files. seconds: to make it, if known."""

    place: str
    stage: str
    holds: str
    content: str
    seconds: float | None
    circumstances: dict[str, str]


def content_hash(known: Artifact) -> str:
    """xxh3-128 over the hashes of an artifact's files, without a model card, which is written when all is known."""
    return joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items() if name != CARD)


def weights_hash(known: Artifact) -> str:
    """xxh3-128 over the hashes of the weights of a model."""
    return joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items() if name.endswith(".safetensors"))


def made(facts: Facts) -> list[Made]:
    """Every artifact, in the order of the stages."""
    found = [_stage(place, known) for place, known in facts.artifacts.items() if known.stage == "data"]
    found += [_store(facts, name) for name in (PIVOT, *facts.sources) if name in facts.stores]
    found += [_stage(place, known) for place, known in facts.artifacts.items() if known.stage == "align"]
    trained = {f"targets/{name}": record for name, record in facts.targets.items()}
    trained |= {BASELINE_PLACE: facts.baseline} if facts.baseline else {}
    for place, record in trained.items():
        known = facts.artifacts.get(place)
        found.append(_stage(place, known) if known is not None else _target(place, record))
    earlier = {one.place for one in found}
    later = [(place, known) for place, known in facts.artifacts.items() if place not in earlier]
    return found + [_stage(place, known) for place, known in later]


def _stage(place: str, known: Artifact) -> Made:
    size = sum(file.size for file in known.files.values())
    holds = f"{text.counted(len(known.files), 'file')}, {human(size)}"
    return Made(place, known.stage, holds, content_hash(known), _seconds(known.made), _circumstances(known.made))


def _store(facts: Facts, name: str) -> Made:
    store, times = facts.stores[name], facts.captures.get(name, {})
    size = human(sum(record.size for record in store.records))
    holds = f"{text.counted(len(store), 'row')} in {text.counted(len(store.records), 'shard')}, {size}"
    content = joined_hash(record.xxh3 for record in store.records)
    circumstances = _circumstances(times) or {str(k): str(v) for k, v in store.manifest.made.items()}
    return Made(f"captures/{name}", "capture", holds, content, _seconds(times), circumstances)


def _target(place: str, record: Training) -> Made:
    # A target of an earlier version has no manifest: what stands for it is what it was made from.
    content = joined_hash([json.dumps(record.made_from, sort_keys=True, default=str)])
    return Made(place, "distill", "a checkpoint; the hash is of its inputs", content, record.last("train_runtime"), {})


def training_seconds(facts: Facts, place: str, record: Training) -> float | None:
    """How long a target took: as its manifest has it, else as the trainer wrote it down."""
    known = facts.artifacts.get(place)
    found = _seconds(known.made) if known is not None else None
    return record.last("train_runtime") if found is None else found


def _seconds(values: Mapping[str, Any]) -> float | None:
    value = values.get("seconds")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _circumstances(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): value for name, value in values.items() if isinstance(value, str)}


def circumstances(artifacts: list[Made]) -> list[tuple[str, str]]:
    """Hosts and versions of all artifacts; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for one in artifacts:
        for name, value in one.circumstances.items():
            found.setdefault(name, {})[value] = None
    return [(name, ", ".join(values)) for name, values in found.items()]


def times(artifacts: list[Made]) -> list[tuple[str, str]]:
    """Seconds per stage, added up over its artifacts, and all of them."""
    found: dict[str, float] = {}
    for one in artifacts:
        if one.seconds is not None:
            found[one.stage] = found.get(one.stage, 0.0) + one.seconds
    total = [("together", text.seconds(sum(found.values())))] if len(found) > 1 else []
    return [(stage, text.seconds(value)) for stage, value in found.items()] + total


@dataclass(frozen=True)
class Identity:
    """What identifies a model that took part: commit on the hub, or a hash of its weights."""

    name: str
    model: str
    weights: str
    tokenizer: str


def identities(facts: Facts) -> list[Identity]:
    """Of the pivot and the sources, as their stores have them."""
    return [
        Identity(name, facts.model_name(name), spec.model_fingerprint, spec.tokenizer)
        for name in (PIVOT, *facts.sources)
        if name in facts.stores
        for spec in [facts.stores[name].spec]
    ]
