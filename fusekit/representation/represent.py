"""One model and prepared rows to a store: found, estimated, compared with what is there, loaded, captured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from fusekit.errors import CaptureError
from fusekit.representation.batches import rows_per_shard
from fusekit.representation.capture import CaptureOptions, capture, data_fingerprint
from fusekit.representation.checkpoint import Checkpoint, ModelChoice
from fusekit.representation.estimate import disk_needs, memory_needs, parameters, refuse
from fusekit.representation.load import load_model, longest_input, valid_ids
from fusekit.representation.processes import Processes
from fusekit.representation.row_tokenizer import RowTokenizer
from fusekit.representation.rows import Row
from fusekit.representation.teacher import Teacher
from fusekit.representation.topk import Selection
from fusekit.storage import Store, StoreSpec
from fusekit.storage.codec import DEFAULT_MAX_ERROR
from fusekit.storage.manifest import MANIFEST, Manifest, Setting, read_json

_SAMPLED_ROWS = 200


@dataclass(frozen=True)
class Settings:
    """What is captured, and how.

    Attributes:
        selection: what is kept of each distribution.
        max_error: bound of the rounding of stored log-probabilities, nats.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        rows_per_shard: what is lost at most when a process dies; None for some minutes of work by model and device,
            and in a store that is there for what it has.
        ignore_estimates: start although disk or memory do not seem to suffice.
        details: what else decides what the store holds, to be compared when a run goes on.
        options: how the capture runs.
    """

    selection: Selection = field(default_factory=Selection)
    max_error: float = DEFAULT_MAX_ERROR
    batch_tokens: int | None = None
    rows_per_shard: int | None = None
    ignore_estimates: bool = False
    details: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    options: CaptureOptions = field(default_factory=CaptureOptions)

    def in_shards_of(self, rows: int) -> Settings:
        """The same with so many rows per shard, unless another number is asked for."""
        return self if self.rows_per_shard is not None else replace(self, rows_per_shard=rows)


def represent(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    out: Path | str,
    settings: Settings,
    *,
    notify: Callable[[str], None] = lambda _line: None,
    processes: Processes | None = None,
) -> Store:
    """Capture what a model says about rows, or what is missing of it.

    Every process of a run calls it with the same arguments.

    Args:
        checkpoint: the model, found but not loaded.
        tokenizer: the model's own, under the template of the run.
        rows: prepared, so that every model of the run reads the same bytes (:func:`prepare`).
        out: folder of the store.
        settings: see there.
        notify: called with lines for the user, in process 0.

    Raises:
        CaptureError: the model cannot be loaded or does not fit; see :func:`capture` for the rest.
        StorageError: the store cannot be written, or is one of something else.
    """
    processes = processes or Processes.current()
    say = notify if processes.is_first else lambda _line: None
    if checkpoint.choice.device_map and processes.world > 1:
        raise CaptureError(
            f"a model that --device-map spreads over the devices runs in one process, not in {processes.world}: start "
            "without a launcher, or leave the option out to load a whole model in every process"
        )
    vocabulary = vocabulary_size(checkpoint, tokenizer)
    if (k := settings.selection.k) > vocabulary:
        say(f"top_k is {k}, but the vocabulary has {vocabulary} ids: all of them are kept")
        settings = replace(settings, selection=replace(settings.selection, k=vocabulary))

    if not all(row.is_text for row in rows):
        facts = tokenizer.facts
        day = f", which prints the date {facts['date']}" if "date" in facts else ""
        say(f"chat template of {checkpoint.choice.model}: {facts['chat_template']}{day}")

    prepared: list[bool] = []
    tokens = cache(lambda: _tokens(tokenizer, rows))

    def prepare() -> None:
        prepared.append(True)
        kept = settings.selection.k
        needs = disk_needs(checkpoint, Path(out), rows=len(rows), tokens=tokens(), vocabulary=vocabulary, top_k=kept)
        needs += memory_needs(checkpoint, settings.batch_tokens, processes)
        for need in needs:
            say(str(need))
        if not settings.ignore_estimates:
            refuse(needs)
        checkpoint.fetch(bar=not settings.options.quiet)

    def new_shards() -> int:
        return rows_per_shard(parameters(checkpoint), tokens() / max(len(rows), 1), processes.device.type)

    def spec() -> StoreSpec:
        known = None if settings.options.overwrite else read_json(Path(out) / MANIFEST, Manifest)
        # Estimates and downloads come before anything is written; where all is there, nothing will be.
        if known is None or not _is_there(Path(out), known):
            prepare()
        in_shards = settings.in_shards_of(known.spec.rows_per_shard if known is not None else new_shards())
        wanted = store_spec(checkpoint, tokenizer, rows, vocabulary, in_shards)
        # A folder of the same weights may have been moved, or be spelled in another way.
        if known and known.spec.model_fingerprint == wanted.model_fingerprint:
            wanted = wanted.model_copy(update={"model": known.spec.model})
        return wanted

    def load() -> Teacher:
        if processes.is_first and not prepared:
            prepare()  # a shard is there, but damaged
        checkpoint.fetch()
        return _teacher(checkpoint, tokenizer, settings, processes, say)

    return capture(rows, tokenizer, load, out=out, spec=spec, options=settings.options, processes=processes)


def _teacher(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    settings: Settings,
    processes: Processes,
    notify: Callable[[str], None],
) -> Teacher:
    """Load the model, whose files are all here."""
    return Teacher(
        load_model(checkpoint, processes.device),
        valid_ids(tokenizer.tokenizer),
        settings.selection,
        batch_tokens=settings.batch_tokens,
        name=checkpoint.choice.model,
        notify=notify,
        longest=longest_input(checkpoint),
    )


def store_spec(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    vocabulary: int,
    settings: Settings,
    *,
    fingerprint: str | None = None,
) -> StoreSpec:
    """What a store is made from: model, tokenizer and template, data, and every setting that changes a value.

    settings: with a number of rows per shard. fingerprint: of the weights, where it is known already.
    """
    assert settings.rows_per_shard is not None
    choice, selection = checkpoint.choice, settings.selection
    return StoreSpec(
        model=choice.model,
        model_fingerprint=fingerprint or checkpoint.fingerprint(),
        tokenizer=tokenizer.fingerprint,
        data=data_fingerprint(rows),
        vocabulary=vocabulary,
        top_k=min(selection.k, vocabulary),
        keep_mass=selection.keep_mass if selection.keep_mass < 1 else None,
        temperature=selection.temperature,
        max_error=settings.max_error,
        rows_per_shard=settings.rows_per_shard,
        details=details_of(choice, tokenizer.train_on) | tokenizer.facts | settings.details,
    )


def details_of(choice: ModelChoice, train_on: str) -> dict[str, Setting]:
    """How a model is loaded, and what it is to learn from: what else decides the values of a store."""
    return {
        "dtype": choice.dtype,
        "quantization": json.dumps(choice.quantization, sort_keys=True) if choice.quantization else None,
        "attn_implementation": choice.attn_implementation,
        "train_on": train_on,
    }


def vocabulary_size(checkpoint: Checkpoint, tokenizer: RowTokenizer) -> int:
    """Above every id that can be stored: the configuration's, or the tokenizer's where that has more."""
    text = checkpoint.config.get("text_config")
    sizes = [config.get("vocab_size") for config in (checkpoint.config, text) if isinstance(config, dict)]
    known = max((size for size in sizes if isinstance(size, int)), default=0)
    return max(known, int(valid_ids(tokenizer.tokenizer)[-1]) + 1)


def _is_there(folder: Path, manifest: Manifest) -> bool:
    """Whether a store is complete, as far as the sizes of its shards tell. Raises OSError."""
    shards = ((folder / record.file, record.size) for record in manifest.shards)
    return manifest.complete and all(path.is_file() and path.stat().st_size == size for path, size in shards)


def _tokens(tokenizer: RowTokenizer, rows: Sequence[Row]) -> int:
    """How many tokens the rows have, about, from some of them."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows))).astype(np.int64)).tolist()
    sampled = sum(len(tokenizer.tokenize(rows[i])) for i in picked)
    return sampled * len(rows) // max(len(picked), 1)
