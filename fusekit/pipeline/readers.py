"""The models of a recipe, found but not loaded, and how each reads rows."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from functools import cached_property

from fusekit import artifacts as artifact
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.templates import ChatTemplate, kept_date
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.pipeline.layout import PIVOT, Layout
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Pivot, Source


def choice_of(model: Pivot) -> ModelChoice:
    """How a model of a recipe is loaded."""
    return ModelChoice(
        model.path,
        revision=model.revision,
        dtype=model.load.dtype,
        device_map=model.load.device_map,
        quantization=model.load.quantization,
        attn_implementation=model.load.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
    )


@dataclass(eq=False)
class Readers:
    """The pivot and the sources of a recipe by name; each is looked up once.

    layout: of the run, which has the plain checkpoint of a pivot that is a GGUF file, and the prepared rows, which keep
        the day that templates print. None for no run.
    """

    recipe: Recipe
    layout: Layout | None = None
    _checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    _readers: dict[str, RowTokenizer] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def date(self) -> datetime.date:
        """The day that templates print in this run: that on which its rows were prepared. Raises StorageError."""
        known = artifact.read(self.layout.data) if self.layout is not None else None
        return kept_date(known.made.get("date") if known is not None else None) or datetime.date.today()

    @property
    def names(self) -> list[str]:
        """``pivot``, then the sources in the order of the recipe."""
        return [PIVOT, *(source.label for source in self.recipe.sources)]

    def model(self, name: str) -> Pivot | Source:
        """What the recipe says of a model."""
        if name == PIVOT:
            return self.recipe.pivot
        return next(source for source in self.recipe.sources if source.label == name)

    def choice(self, name: str) -> ModelChoice:
        """How a model is loaded."""
        choice = choice_of(self.model(name))
        pivot = self.layout.pivot if self.layout is not None else None
        return replace(choice, dequantised=pivot) if name == PIVOT else choice

    def add(self, name: str, checkpoint: Checkpoint) -> None:
        """Take a model that was found already."""
        self._checkpoints[name] = checkpoint

    def checkpoint(self, name: str) -> Checkpoint:
        """The model on disk or on the hub. Raises CaptureError."""
        if name not in self._checkpoints:
            self._checkpoints[name] = find_checkpoint(self.choice(name))
        return self._checkpoints[name]

    def fingerprint(self, name: str) -> str:
        """What identifies a model's weights; a folder is read from end to end, once. Raises CaptureError."""
        if name not in self._fingerprints:
            self._fingerprints[name] = self.checkpoint(name).fingerprint()
        return self._fingerprints[name]

    def reader(self, name: str) -> RowTokenizer:
        """How the model reads rows in this run. Raises CaptureError, DataError."""
        if name not in self._readers:
            template = self.model(name).chat_template
            tokenizer = load_tokenizer(self.checkpoint(name))
            train_on = self.recipe.data.train_on
            if template == PIVOT and name != PIVOT:
                pivot = self.reader(PIVOT)
                try:
                    theirs = pivot.template
                except DataError:  # plain text needs none, and conversations are refused when the pivot reads them
                    theirs = None
                self._readers[name] = RowTokenizer(tokenizer, theirs, train_on, foreign=pivot.tokenizer, date=self.date)
            else:
                self._readers[name] = RowTokenizer(tokenizer, ChatTemplate.chosen(template), train_on, date=self.date)
        return self._readers[name]
