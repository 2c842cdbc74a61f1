"""What is written beside the weights: mergekit's card and recipe, and the coefficients of every tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mergekit.card import generate_card
from mergekit.config import MergeConfiguration

from fusekit import mergekit_private
from fusekit.merge_methods.provenance import MergeRecord, write_json
from fusekit.merging.models import Model

COEFFICIENTS = "coefficients.json"


def write_card(folder: Path, name: str, config: MergeConfiguration, source: str, models: Iterable[Model]) -> None:
    """Write README.md and mergekit_config.yml as mergekit does. source: the recipe's text; name: the model's.

    The commits of hub models are added: the recipe alone does not say which weights were merged.
    """
    models = list(models)
    local = {model.reference.model.path for model in models if not model.snapshot}

    def is_on_hub(path: str) -> bool:
        return path not in local and not (path[0] in "/~." or path.count("/") > 1 or os.path.exists(path))  # noqa: PTH110

    with mergekit_private.hub_models(is_on_hub):
        card = generate_card(config=config, config_yaml=source, name=name)
    commits = [f"* {model.origin}" for model in models if model.snapshot]
    if commits:
        card += "\n### Revisions\n\n" + "\n".join(commits) + "\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


def write_coefficients(folder: Path, record: MergeRecord, card: bool) -> None:
    """Write coefficients.json and, if there is a card, its section; nothing if no fusekit method ran."""
    if not record:
        return
    write_json(record.as_dict(), folder / COEFFICIENTS)
    if card:
        with (folder / "README.md").open("a", encoding="utf-8") as file:
            file.write("\n" + record.markdown().strip("\n") + "\n")
