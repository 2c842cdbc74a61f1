"""The last stage: what the run was, as one page, and the card of the merged model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fusekit.artifacts import commit_file
from fusekit.capturing.manifest import MANIFEST, Manifest, read_json
from fusekit.environment import circumstances
from fusekit.errors import FusekitError
from fusekit.report.models import facts_of, read_models, write_models
from fusekit.report.write import write_report

if TYPE_CHECKING:
    from fusekit.pipeline.stages import Context


@contextmanager
def timed(context: Context, name: str, first: bool = True) -> Iterator[None]:
    """Note down how long the capture of a model takes in the run that finishes it; stores keep no times.

    first: whether this is the process that notes it down.
    """
    started, store = time.monotonic(), context.layout.store(name) / MANIFEST
    before = read_json(store, Manifest) if first else None
    yield
    if not first or (before is not None and before.complete):
        return
    path = context.layout.times
    path.parent.mkdir(exist_ok=True)
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        known = {}
    known = known if isinstance(known, dict) else {}  # times are for people: damaged ones are begun anew
    known[name] = {**circumstances(), "seconds": round(time.monotonic() - started, 3)}
    text = json.dumps(known, indent=1, ensure_ascii=False) + "\n"
    commit_file(path, lambda file: file.write(text.encode()))


def describe(context: Context) -> None:
    """Note down what is known of the pivot and the sources while they are at hand; what was known of one stays."""
    path = context.layout.models
    try:
        known = read_models(path)
    except (OSError, ValueError):
        known = {}
    facts = {}
    for name in context.readers.names:
        before = known.get(name)
        try:
            checkpoint = context.readers.checkpoint(name)
            if before is None or None in (before.parameters, before.tokenizer) or before.commit != checkpoint.commit:
                before = facts_of(checkpoint, context.readers.reader(name).tokenizer)
        except FusekitError:  # it has served, and may be gone
            pass
        if before is not None:
            facts[name] = before
    write_models(path, facts)


def report(context: Context) -> None:
    """Write ``report.html`` and the card of the merged model; does nothing where they are as they would be."""
    describe(context)
    for line in write_report(context.layout.out):
        context.say(f"report: {line}")
