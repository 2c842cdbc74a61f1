"""Write the report of a run and the card of its merged model, each only if its content changes."""

from __future__ import annotations

import uuid
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file
from fusekit.report.card import card
from fusekit.report.facts import read_facts
from fusekit.report.page import CARD, page


def write_report(out: Path, *, with_card: bool = True) -> list[str]:
    """Write ``report.html`` of a run, finished or not, and the card of its merged model if there is one.

    The same artifacts give the same bytes. The card is a file of the artifact ``merged/`` and is replaced together with
    its entry in the manifest, so that ``fusekit verify`` passes at any moment. A card that somebody changed is kept.

    Args:
        out: folder of the run.
        with_card: False leaves the card alone; True needs the lock of the run.

    Returns:
        A line for each file that was written or could not be.

    Raises:
        StorageError: ``out`` is not the output of a run, or the disk failed.
    """
    facts, said = read_facts(out), []
    if with_card and facts.merged is not None:
        folder = facts.layout.merged
        try:
            if artifact.replace_file(folder, CARD, _encoded(card(facts, facts.merged))):
                said.append(str(folder / CARD))
        except artifact.ChangedError as error:
            said.append(f"warning: {error}")
        facts = read_facts(out) if said else facts  # the page shows the artifacts with this card
    path, data = facts.layout.report, _encoded(page(facts))
    if path.is_file() and path.read_bytes() == data:
        return said
    # Without the lock another process may be writing the page: the temporary file then has a name of its own. One that
    # a killed process leaves is overwritten by the next that has the lock, or removed by `fusekit clean`.
    commit_file(path, lambda file: file.write(data), rank=0 if with_card else uuid.uuid4().int)
    return [*said, str(path)]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # JSON files may hold half a surrogate pair
