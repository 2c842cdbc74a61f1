"""What can be known of a recipe's models without loading one: from the disk, the hub, or the recipe's own sizes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusekit.capturing.estimate import itemsize
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import FusekitError
from fusekit.hub import HubUnreachableError
from fusekit.pipeline.layout import PIVOT, Layout
from fusekit.pipeline.readers import Readers, choice_of
from fusekit.recipe import Recipe
from fusekit.recipe.sections import ModelSize, Pivot

LOCAL, CACHED, HUB, SAID = "folder", "cache", "hub", "recipe"
"""Where what is known of a model comes from."""


@dataclass
class Known:
    """A model. checkpoint: None where nothing is known of it; made up from the recipe's size where ``origin`` is SAID.

    active: parameters that take part in a token.
    """

    name: str
    model: str
    checkpoint: Checkpoint | None = None
    origin: str = ""
    active: int | None = None

    @property
    def here(self) -> bool:
        """Whether its weights are on this machine."""
        return self.checkpoint is not None and self.origin != SAID and not self.checkpoint.download_bytes

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are not here yet, as far as is known."""
        if self.checkpoint is None:
            return 0
        return self.checkpoint.weight_bytes if self.origin == SAID else self.checkpoint.download_bytes


@dataclass
class Models:
    """The models of a recipe by name, how each reads rows, and what went wrong on the way.

    refused: what stops a run. unknown: what is only not known here.
    """

    known: dict[str, Known]
    readers: Readers
    tokenizers: dict[str, RowTokenizer] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def pivot(self) -> Known:
        return self.known[PIVOT]


def find_models(recipe: Recipe, layout: Layout | None = None) -> Models:
    """Look every model up, all at once: each waits for the hub no longer than one would.

    layout: of the run, None where it has no folder yet.
    Nothing is loaded and no weights are fetched; the hub's client keeps the small files that it fetches in its cache.
    """
    readers = Readers(recipe, layout)
    names = readers.names
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(lambda name: _look_up(readers.choice(name)), names), strict=True))
    models = Models({}, readers)
    for name in names:
        section, checkpoint = readers.model(name), found[name]
        known = Known(name, section.path)
        if isinstance(checkpoint, Checkpoint):
            readers.add(name, checkpoint)
            known.checkpoint, known.origin = checkpoint, _origin(checkpoint)
            models.unknown += checkpoint.notices
        else:
            unreachable = isinstance(checkpoint, HubUnreachableError)
            if not unreachable or section.size is None:
                hint = "" if section.size else "; `size:` in the recipe would let a plan count it"
                (models.unknown if unreachable else models.refused).append(f"{checkpoint}{hint}")
            if section.size is not None:
                known.checkpoint, known.origin = made_up(section, section.size), SAID
        if section.size is not None:
            known.active = section.size.active_parameters
        models.known[name] = known
    _read_tokenizers(models)
    return models


def _look_up(choice: ModelChoice) -> Checkpoint | FusekitError:
    try:
        return find_checkpoint(choice, download=False)
    except HubUnreachableError as error:
        return error
    except FusekitError as error:
        return _without_weights(choice) or error


def _without_weights(choice: ModelChoice) -> Checkpoint | None:
    """A model of which only the small files are cached, where the hub does not answer: as large as its index says."""
    try:
        found = find_checkpoint(choice, weights=False, download=False)
        if found.snapshot is None or found.snapshot.online:
            return None
        index = json.loads((found.folder / "model.safetensors.index.json").read_bytes())
        total = int(index["metadata"]["total_size"])
    except (FusekitError, OSError, ValueError, KeyError, TypeError):
        return None
    notices = [*found.notices, f"{choice.model}: its weights are not in the cache, so a run has to reach the hub"]
    return replace(found, weights={"model.safetensors": total}, notices=notices)


def _origin(checkpoint: Checkpoint) -> str:
    if checkpoint.snapshot is None:
        return LOCAL
    return HUB if checkpoint.download_bytes else CACHED


def made_up(section: Pivot, size: ModelSize) -> Checkpoint:
    """A checkpoint as large as the recipe says, in no folder."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "dtype")
    config: dict[str, Any] = {name: getattr(size, name) for name in names if getattr(size, name) is not None}
    weights = {"model.safetensors": size.parameters * itemsize(size.dtype)}
    return Checkpoint(choice_of(section), Path("(not here)"), config, weights)


def _read_tokenizers(models: Models) -> None:
    for name, known in models.known.items():
        if known.checkpoint is None or known.origin == SAID:
            continue
        if models.readers.model(name).chat_template == PIVOT and PIVOT not in models.tokenizers:
            continue  # it reads as the pivot does, which is not known
        try:
            models.tokenizers[name] = models.readers.reader(name)
        except FusekitError as error:
            models.refused.append(str(error))
