"""One model and prepared rows to a store: found, estimated, compared with what is there, loaded, captured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from fusekit.artifacts import output_lock
from fusekit.capture.batches import rows_per_shard
from fusekit.capture.codec import Columns
from fusekit.capture.engine import Teacher
from fusekit.capture.estimate import disk_needs, memory_needs, parameters, refuse
from fusekit.capture.load import load_model, longest_input, valid_ids
from fusekit.capture.manifest import MANIFEST, Manifest, Setting, StoreSpec, read_json
from fusekit.capture.models import Checkpoint, ModelChoice
from fusekit.capture.progress import Progress
from fusekit.capture.settings import DEFAULT_MAX_ERROR
from fusekit.capture.store import Store
from fusekit.capture.topk import Selection
from fusekit.capture.writer import ShardPlan, StoreWriter, remove_store
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.errors import CaptureError
from fusekit.types import Row, TokenizedRow

_SAMPLED_ROWS = 200
MAX_QUARANTINED = 0.01
"""Share of the rows that may be quarantined before a capture stops."""


class Tokenizes(Protocol):
    """Reads rows for one model, as RowTokenizer does."""

    def tokenize(self, row: Row) -> TokenizedRow: ...


def data_fingerprint(rows: Sequence[Row]) -> str:
    """xxh3-128 of the rows in order: their keys, where they are cut, and their sources of data."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(f"{row.key} {row.cut} {row.dataset!r}\n".encode())
    return digest.hexdigest()


def capture(
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    load: Callable[[], Teacher],
    *,
    out: Path | str,
    spec: Callable[[], StoreSpec],
    options: CaptureOptions | None = None,
    processes: Processes | None = None,
) -> Store:
    """Capture what a model says about rows into a store, or what is missing of it.

    Every process of the run calls it with the same arguments. Shard i is written by process i % world; the whole store
    is there when it returns, in all of them. What was written before a failure stays, and counts at the next call.

    Args:
        rows: each content once, in the order of the store.
        tokenizer: reads them for this model.
        load: the model; called only if there is something to capture.
        out: folder of the store.
        spec: what the store is made from; called in process 0.
        options, processes: see there; by default the processes of the launcher.

    Raises:
        CaptureError: see :meth:`Teacher.score`; too many rows without a distribution.
        StorageError: another run writes ``out``; it holds something else, or a store made from something else (says
            what differs); the disk failed.
    """
    options, processes = options or CaptureOptions(), processes or Processes.current()
    path, keys, world = Path(out).resolve(), [row.key for row in rows], processes.world
    with ExitStack() as held:
        opened: list[StoreWriter] = []

        def start() -> StoreSpec:
            # Process 0 says what stands in the way before the others look; its lock is the run's.
            held.enter_context(output_lock(path))
            if options.overwrite:
                remove_store(path)
            opened.append(StoreWriter(path, spec(), keys, world=world))
            _refuse_quarantined(opened[0], options.max_quarantined)
            return opened[0].spec

        agreed = processes.first_then_all(start)
        writer = opened[0] if opened else StoreWriter(path, agreed, keys, processes.rank, world)
        if missing := writer.missing_shards():
            _Shards(rows, tokenizer, load(), writer, options).write(missing)
        processes.wait()

        def finish() -> None:
            _refuse_quarantined(writer, options.max_quarantined)
            writer.finish()

        processes.first_then_all(finish)
    return Store.open(out)  # errors and reports name it as the caller does


@dataclass(frozen=True)
class _Shards:
    """Captures shards of rows and commits them."""

    rows: Sequence[Row]
    tokenizer: Tokenizes
    teacher: Teacher
    writer: StoreWriter
    options: CaptureOptions

    def write(self, missing: list[ShardPlan]) -> None:
        """Raises CaptureError when more rows have no distribution than may."""
        world = self.writer.world
        label = "capturing" if world == 1 else f"capturing (process 0 of {world})"
        total = sum(plan.stop - plan.start for plan in missing)
        with Progress(total, quiet=self.options.quiet or self.writer.rank > 0, label=label) as progress:
            for done, plan in enumerate(missing, 1):
                some = self._write_one(plan, progress)
                self.options.on_shard(done, len(missing))
                if some:
                    _refuse_quarantined(self.writer, self.options.max_quarantined)

    def _write_one(self, plan: ShardPlan, progress: Progress) -> int:
        """One shard; returns how many of its rows are quarantined."""
        rows = self.rows[plan.start : plan.stop]
        tokenized = [self.tokenizer.tokenize(row) for row in rows]
        encoded: dict[int, Future[Columns]] = {}
        quarantined: dict[int, str] = {}
        # Encoded as they come, beside the next batch: the rows of a shard take a third of the memory then.
        with ThreadPoolExecutor(1) as pool:
            for batch in self.teacher.score_batches(tokenized, [row.dataset for row in rows]):
                for index, scored in batch:
                    if isinstance(scored, str):
                        quarantined[index] = scored
                    else:
                        encoded[index] = pool.submit(self.writer.codec.encode, scored)
                progress.advance(len(batch), sum(len(tokenized[index]) for index, _ in batch))
        columns = [encoded[i].result() for i in sorted(encoded)]
        found = {rows[i].key: quarantined[i] for i in sorted(quarantined)}
        self.writer.write_columns(plan, columns, found)
        return len(found)


def _refuse_quarantined(writer: StoreWriter, share: float) -> None:
    """Raises CaptureError when more rows of all shards, those of earlier runs too, have no distribution than may."""
    quarantined, total = writer.quarantined(), len(writer.keys)
    allowed = max(1, int(share * total))
    if len(quarantined) > allowed:
        key, why = next(iter(quarantined.items()))
        raise CaptureError(
            f"{writer.path}: {len(quarantined)} rows have no distribution, more than the {allowed} of {total} that may "
            f"(--max-quarantined {share:g}); the first is {key}: {why}. Are the model's weights whole, and is its "
            "dtype one that it was trained for? If so many may be missing, raise the limit: what is captured stays"
        )


@dataclass(frozen=True)
class CaptureOptions:
    """How a capture runs; nothing here changes what a store holds.

    Attributes:
        overwrite: start anew where a store is.
        quiet: no progress.
        max_quarantined: share of all rows for which the model may give no distribution; one row always may.
        on_shard: called after each shard with its number and that of all shards that this process had to write.
    """

    overwrite: bool = False
    quiet: bool = False
    max_quarantined: float = MAX_QUARANTINED
    on_shard: Callable[[int, int], None] = lambda _done, _all: None


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
