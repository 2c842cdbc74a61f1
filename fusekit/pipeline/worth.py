"""What a source is worth as a teacher, measured when a pair is aligned and both models are captured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.capturing.store import Store
from fusekit.errors import StorageError
from fusekit.pipeline.layout import PIVOT
from fusekit.pipeline.stages import Context, alignment_of
from fusekit.types import Row

EXAMPLES = 256
"""Read of a run's rows, evenly spaced: some ten thousands of labels."""


def measure_worth(context: Context, source: str, rows: list[Row]) -> None:
    """Measure, say and keep what a source's projected rows know; nothing where captures are missing, or read otherwise.

    It is a file of the pair's alignment, which needs no captures itself; it is made anew when what it was measured on
    has changed.

    Raises:
        StorageError: a store is damaged.
        DistillationError: captured rows are not usable.
    """
    from fusekit.distillation.worth import Captured, measure_stores

    how = alignment_of(context, source)
    pivot, theirs = _captured(context, PIVOT, rows), _captured(context, source, rows)
    if how.vocabulary in ("none", "matched") or pivot is None or theirs is None:
        return
    path, folder = context.layout.worth(source), context.layout.alignment(source)
    of = {"alignment": how.model_dump(mode="json"), "pivot": _shards(pivot), "source": _shards(theirs)}
    if _measured_on(path) == of:
        return
    ours, teacher = (Captured(n, context.readers.reader(n).tokenizer, s) for n, s in ((PIVOT, pivot), (source, theirs)))
    worth = measure_stores(rows, ours, teacher, how, folder=folder, most=EXAMPLES)
    text = json.dumps({**worth.to_dict(), "of": of}, indent=1) + "\n"
    artifact.replace_file(folder, path.name, text.encode())
    context.say(f"align {source}: {worth.summary[0]}")
    if worth.warnings:
        context.say(f"warning: align {source}: {'; '.join(worth.warnings)}")


def _captured(context: Context, name: str, rows: list[Row]) -> Store | None:
    """The store of a model, if it is whole, has rows of the run, and read them as the recipe reads."""
    folder = context.layout.store(name)
    if not (folder / artifact.MANIFEST).is_file():
        return None
    store = Store.open(folder, incomplete=True)
    is_of_run = (
        store.complete
        and store.spec.tokenizer == context.readers.reader(name).fingerprint
        and any(row.key in store for row in rows)
    )
    return store if is_of_run else None


def _shards(store: Store) -> str:
    return artifact.joined_hash(record.xxh3 for record in store.records)


def _measured_on(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()).get("of")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: {error}; remove it, and the stage `align` makes it anew") from error
