"""What a run reads: the pivot, the rows, the stores; opened, and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.alignment.ends import tokenize
from fusekit.capturing.capture import Tokenizes
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.distillation.dataset import PIVOT, FusionDataset
from fusekit.distillation.live import LiveTeacher, live_teacher
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import VOCABULARIES, AlignmentSettings, DistillSettings
from fusekit.distillation.vocabulary_maps import SAMPLED, make_map, read_map, roles_of
from fusekit.errors import DistillationError
from fusekit.types import Part, Row, TokenizedRow


@dataclass(frozen=True)
class Source:
    """A model that teaches.

    Attributes:
        store: folder of what it said about the rows; None to score it while training reads.
        tokenizer: the model that has its tokenizer, a folder or hub name where nothing else has to be said of it; None
            for the model that the store names.
        alignment: settings of its own; None for the run's.
        reader: how it reads conversations, for ``on_policy`` and without a store; None for its own template.
        vocabulary_map: folder of the map that was made of the same rows
            (:func:`fusekit.distillation.vocabulary_maps.write_map`); None to make it here.
        live: what is kept of its distributions, where there is no store; None for the defaults. ``tokenizer`` is then
            the model.
        rows: as this model reads them, where there is no store; None for the run's.
    """

    store: Path | None
    tokenizer: ModelChoice | str | None = None
    alignment: AlignmentSettings | None = None
    reader: RowTokenizer | None = None
    vocabulary_map: Path | None = None
    live: CaptureSettings | None = None
    rows: Sequence[Row] | None = None

    def tokenizer_choice(self, stored: str) -> ModelChoice:
        """The model that has its tokenizer. stored: the one that the store names."""
        choice = self.tokenizer or stored
        return choice if isinstance(choice, ModelChoice) else ModelChoice(choice)


@dataclass(frozen=True)
class Responses:
    """Models' own answers to the questions of the data, the best of each.

    Attributes:
        rows: the conversations with the answers.
        writers: by key, the model that wrote the answer.
        stores: by model, the folder of what it said about the answers: the pivot about all, a source about its own.
    """

    rows: Sequence[Row]
    writers: Mapping[str, str]
    stores: Mapping[str, Path]


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        pivot: the model to train.
        rows: the data that the stores were captured from; rows that no store has may be among them.
        pivot_store: folder of what the pivot said about them; None where that is not wanted.
        sources: by name.
        row_tokenizer: how the pivot reads rows that its store lacks; needed without a store.
        responses: what a schedule also trains on.
        max_length: most tokens of an example, for ``on_policy``.
    """

    pivot: ModelChoice
    rows: Sequence[Row]
    pivot_store: Path | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    row_tokenizer: Tokenizes | None = None
    responses: Responses | None = None
    max_length: int = 2048


@dataclass(frozen=True, eq=False)
class Opened:
    """Inputs that fit each other."""

    checkpoint: Checkpoint
    pivot_fingerprint: str
    tokenizer: Any
    rows: Sequence[Row]
    pivot_store: Store | None
    stores: dict[str, Store | LiveTeacher]
    projections: dict[str, Projection]
    settings: DistillSettings
    row_tokenizer: Tokenizes | None
    responses: Responses | None

    def dataset(self, sources: Sequence[str]) -> FusionDataset:
        """The examples of a target that these sources teach."""
        return FusionDataset(
            self.rows,
            pivot=self.pivot_store,
            sources={name: self.stores[name] for name in sources},
            projections={name: self.projections[name] for name in sources},
            tokenizer=self.row_tokenizer,
            fusion=self.settings.fusion,
            relative=self.settings.training.lm_weighting == "relative",
        )

    def answers(self, sources: Sequence[str]) -> FusionDataset:
        """The answers that these sources and the pivot wrote, each taught by its writer. Raises DistillationError."""
        if self.responses is None:
            raise DistillationError(
                "a schedule trains on models' own answers, but there are none: `fusekit run` makes them from the "
                "recipe's section `respond`"
            )
        opened = {
            name: Store.open(self.responses.stores[name]) for name in (PIVOT, *sources) if name in self.responses.stores
        }
        own = opened.pop(PIVOT, None)
        return FusionDataset(
            self.responses.rows,
            pivot=own,
            sources=opened,
            projections={name: self.projections[name] for name in opened},
            tokenizer=self.row_tokenizer,
            fusion=self.settings.fusion,
            writers=self.responses.writers,
        )

    def live(self, sources: Sequence[str]) -> list[LiveTeacher]:
        """Those of them that are scored while training reads."""
        found = (self.stores[name] for name in sources)
        return [teacher for teacher in found if isinstance(teacher, LiveTeacher)]

    def stores_of(self, sources: Sequence[str]) -> dict[str, Store | LiveTeacher]:
        """The stores that a target is made from, by name."""
        found: dict[str, Store | LiveTeacher] = {}
        if self.pivot_store is not None:
            found[PIVOT] = self.pivot_store
        return found | {name: self.stores[name] for name in sources}


def open_inputs(
    inputs: Inputs, settings: DistillSettings, sources: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> Opened:
    """Find the pivot, open the stores of ``sources``, and make their vocabulary maps.

    Raises:
        CaptureError: a model or tokenizer cannot be found.
        StorageError: a store is damaged or not complete.
        DistillationError: stores that were made with another temperature, pivot or tokenizer than the run's.
    """
    refuse_rewards(settings)
    if settings.training.lm_weighting == "relative" and inputs.pivot_store is None and sources:
        raise DistillationError(
            "lm_weighting relative compares the teachers with the pivot, but there is no store of the pivot: capture "
            "it, or use lm_weighting constant"
        )
    checkpoint = find_checkpoint(inputs.pivot)
    processes = Processes.current()
    processes.first_then_all(checkpoint.fetch)
    fingerprint = processes.first_then_all(checkpoint.fingerprint)
    tokenizer = load_tokenizer(checkpoint)
    pivot_store = Store.open(inputs.pivot_store) if inputs.pivot_store is not None else None
    stores: dict[str, Store | LiveTeacher] = {}
    for name in sources:
        source = inputs.sources[name]
        if source.store is not None:
            stores[name] = Store.open(source.store)
        else:
            model, rows = source.tokenizer_choice(""), source.rows if source.rows is not None else inputs.rows
            kept = source.live or CaptureSettings()
            stores[name] = live_teacher(name, model, rows, kept, reader=source.reader, say=say)
    for name, store in [*([(PIVOT, pivot_store)] if pivot_store is not None else []), *stores.items()]:
        refuse_temperature(name, store, settings)
    by_key = {row.key: row for row in inputs.rows}
    if pivot_store is not None:
        _refuse_other_pivot(pivot_store, fingerprint, checkpoint)
    ours = Reading.of(PIVOT, tokenizer, pivot_store, by_key)
    projections = {}
    for name, store in stores.items():
        source = inputs.sources[name]
        theirs = load_tokenizer(find_checkpoint(source.tokenizer_choice(store.spec.model), weights=False))
        reading = Reading.of(name, theirs, store, by_key)
        how = source.alignment or settings.alignment
        make = partial(projection_of, how, ours, reading, inputs.rows, source.vocabulary_map)
        if processes.world > 1:
            processes.first_then_all(lambda make=make: make() and None)  # type: ignore[misc]
        projections[name] = make()  # the others find the map in the cache
    return Opened(
        checkpoint,
        fingerprint,
        tokenizer,
        inputs.rows,
        pivot_store,
        stores,
        projections,
        settings,
        inputs.row_tokenizer,
        inputs.responses,
    )


def refuse_rewards(settings: DistillSettings) -> None:
    """Raise DistillationError where targets need rewards, which no store has."""
    if settings.fusion.function == "reward_softmax":
        raise DistillationError(
            "reward_softmax needs a reward per example and model, which no store has: use it from Python "
            "(FusionDataset(rewards=...)), or choose min_ce or avg_ce"
        )


def refuse_temperature(name: str, store: Store | LiveTeacher, settings: DistillSettings) -> None:
    """Raise DistillationError where a store holds rows of another temperature than the loss has."""
    if store.spec.temperature != settings.training.temperature:
        raise DistillationError(
            f"the store of {name} holds rows of temperature {store.spec.temperature}, but the loss has temperature "
            f"{settings.training.temperature}: capture it at that temperature, or set it to the store's"
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's tokenizer, some rows as the model read them, and how many ids its store may have (0: no store)."""

    name: str
    tokenizer: Any
    sample: Sequence[tuple[Row, TokenizedRow]]
    vocabulary: int

    @classmethod
    def of(cls, name: str, tokenizer: Any, store: Store | LiveTeacher | None, rows: Mapping[str, Row]) -> Reading:
        """The tokenizer of a model with what it has of the rows, which are given by key.

        Raises DistillationError when the rows were read with another tokenizer than this.
        """
        if store is None:
            return cls(name, tokenizer, (), 0)
        keys = islice((key for key in store.keys if key in rows), SAMPLED)
        read = store.tokens if isinstance(store, LiveTeacher) else lambda key: store.get(key).tokens
        made = cls(name, tokenizer, [(rows[key], read(key)) for key in keys], store.spec.vocabulary)
        made._check()
        return made

    def _check(self) -> None:
        """Raises DistillationError when the rows were read with another tokenizer than this.

        Tokens at the seams of a template may differ from those of the content alone, so not all have to be equal.
        """
        equal = total = 0
        for row, tokens in self.sample:
            for number, message in enumerate(row.messages):
                read = tokens.ids[(tokens.message == number) & (tokens.part == Part.CONTENT)]
                expected = tokenize(message.content, self.tokenizer).ids[: len(read) + 1]
                total += len(read)
                equal += int(np.isin(read, expected).sum())
        if equal < total / 2:
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise DistillationError(
                f"the store of {self.name} was captured with another tokenizer than {name}: of {total} of its tokens "
                f"{equal} are what that tokenizer makes of the same text; name the right one"
            )

    def roles(self) -> dict[str, int]:
        """The tokens that end a turn and a text."""
        return roles_of(self.sample)


def _refuse_other_pivot(store: Store, fingerprint: str, checkpoint: Checkpoint) -> None:
    captured = store.spec.model_fingerprint
    if captured and captured != fingerprint:
        raise DistillationError(
            f"the pivot's store was captured from {store.spec.model} ({captured}), but the pivot is "
            f"{checkpoint.choice.model} ({fingerprint}): capture it again, or train the model that it was captured from"
        )


def projection_of(
    how: AlignmentSettings, ours: Reading, theirs: Reading, rows: Sequence[Row], folder: Path | None = None
) -> Projection:
    """How a source's rows come to stand at the pivot's positions.

    Args:
        how: settings.
        ours, theirs: the pivot and the source.
        rows: that are trained on.
        folder: of the vocabulary map; None to make it.

    Raises:
        StorageError: the map is not there, damaged or another.
        DistillationError: it has fewer ids than the source's store.
    """
    if how.map_method is None:
        return Projection(None)
    if folder is not None:
        made = read_map(folder, how.map_method, ours.tokenizer, theirs.tokenizer)
        if made.matrix.shape[0] < theirs.vocabulary:
            raise DistillationError(
                f"{folder}: the vocabulary map has {made.matrix.shape[0]} rows, but the store of {theirs.name} has ids "
                f"up to {theirs.vocabulary}: remove {folder}, and the stage `align` makes it again"
            )
    else:
        made = make_map(
            how.map_method,
            ours.tokenizer,
            theirs.tokenizer,
            rows,
            pivot_roles=ours.roles(),
            source_roles=theirs.roles(),
            size=theirs.vocabulary,
        )
    tokens = how.vocabulary if how.vocabulary in VOCABULARIES.values() else how.tokens
    return Projection(made, tokens, how.tail, how.conditioning, how.one_hot, how.collisions)
