"""What is written beside the weights: mergekit's card and recipe, and the provenance of every coefficient."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import mergekit.card
from mergekit.config import MergeConfiguration

from fusekit.merging.models import Model

PROVENANCE_FILE = "coefficients.json"


class Record(Protocol):
    """What ``fusekit.merge_methods.provenance.record_coefficients`` yields; false if no fusekit method ran."""

    def as_dict(self) -> dict[str, Any]: ...

    def markdown(self) -> str: ...

    def __bool__(self) -> bool: ...


def write_card(folder: Path, name: str, config: MergeConfiguration, source: str, models: Iterable[Model]) -> None:
    """Write README.md and mergekit_config.yml as mergekit does. source: the recipe's text; name: the model's.

    The commits of hub models are added: the recipe alone does not say which weights were merged.
    """
    with _no_network():
        card = mergekit.card.generate_card(config=config, config_yaml=source, name=name)
    commits = [f"* {model.origin}" for model in models if model.snapshot]
    if commits:
        card += "\n### Revisions\n\n" + "\n".join(commits) + "\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


def write_provenance(folder: Path, record: Record, card: bool) -> None:
    """Write coefficients.json and, if there is a card, its section; nothing if no fusekit method ran."""
    if not record:
        return
    text = json.dumps(record.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")
    if card:
        with (folder / "README.md").open("a", encoding="utf-8") as file:
            file.write("\n" + record.markdown().strip("\n") + "\n")


@contextmanager
def _no_network() -> Iterator[None]:
    """Let mergekit write its card from what is here.

    To tell a local folder with one slash in its name from a hub id, mergekit asks the hub: a merge without a network
    fails at its very last step, and names of private folders are sent out.
    """
    original = mergekit.card.is_hf
    mergekit.card.is_hf = lambda path: not (path[0] in "/~." or path.count("/") > 1 or os.path.exists(path))  # noqa: PTH110
    try:
        yield
    finally:
        mergekit.card.is_hf = original
