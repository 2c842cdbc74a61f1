"""Write the report of a run and the card of its merged model, each only where it is not there as it would be."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file
from fusekit.report.card import card
from fusekit.report.facts import Facts, read_facts
from fusekit.report.page import page
from fusekit.report.provenance import CARD


def write_report(out: Path, *, with_card: bool = True) -> list[str]:
    """Make ``report.html`` of a run, finished or not, and the card of its merged model where there is one.

    The same artifacts give the same bytes, and what is there already is left alone. The card is a file of the artifact
    ``merged/``: it is replaced together with its entry in the manifest, so that ``fusekit verify`` finds nothing at any
    moment; one that somebody wrote or changed is left as it is.

    Args:
        out: folder of the run.
        with_card: False leaves the card alone; True needs the lock of the run.

    Returns:
        A line for each file that was written or could not be.

    Raises:
        StorageError: ``out`` is no run, or the disk failed.
    """
    facts, said = read_facts(out), []
    if with_card and facts.merged is not None and (wrote := _write_card(facts)):
        said += wrote
        facts = read_facts(out)  # the page says what the artifacts hold, this card too
    return said + _write_page(facts, locked=with_card)


def _write_card(facts: Facts) -> list[str]:
    folder = facts.layout.merged
    assert facts.merged is not None
    data = _encoded(card(facts, facts.merged))
    return _tried(lambda: artifact.replace_file(folder, CARD, data), folder / CARD)


def _write_page(facts: Facts, *, locked: bool) -> list[str]:
    """locked: whether no other process writes this run; else the half-written page has a name of its own."""
    path, data = facts.layout.report, _encoded(page(facts))
    if path.is_file() and path.read_bytes() == data:
        return []
    # What a process that dies leaves behind: the next that has the lock overwrites it, or `fusekit clean` removes it.
    commit_file(path, lambda file: file.write(data), rank=0 if locked else uuid.uuid4().int)
    return [str(path)]


def _tried(write: Callable[[], bool], path: Path) -> list[str]:
    try:
        return [str(path)] if write() else []
    except artifact.ChangedError as error:
        return [f"warning: {error}"]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair from a JSON file is no text
