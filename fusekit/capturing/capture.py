"""A model and prepared rows to a store: estimated, compared with what is there, loaded, captured shard by shard."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from fusekit.artifacts import counted, differences, output_lock, remove
from fusekit.capturing.codec import Columns
from fusekit.capturing.engine import Teacher, rows_per_shard
from fusekit.capturing.engines.opening import Opening
from fusekit.capturing.engines.replies import Scorer
from fusekit.capturing.estimate import disk_needs, head_dtype, memory_needs, parameters, refuse
from fusekit.capturing.load import load_model, loading_mistakes, longest_input, valid_ids
from fusekit.capturing.manifest import MANIFEST, Manifest, Setting, StoreSpec, read_json
from fusekit.capturing.models import Checkpoint, ModelChoice
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.capturing.writer import ShardPlan, StoreWriter, remove_store
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes, progress
from fusekit.errors import CaptureError
from fusekit.resources import worth_saying
from fusekit.types import Row, TokenizedRow

_SAMPLED_ROWS = 200


class Tokenizes(Protocol):
    """Reads rows for one model, as RowTokenizer does."""

    def tokenize(self, row: Row) -> TokenizedRow: ...


def capture(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    out: Path | str,
    settings: CaptureSettings | None = None,
    *,
    processes: Processes | None = None,
    **options: Any,
) -> Store:
    """Capture what a model says about rows, or what is missing of it: :class:`Capture` made and run once.

    Every process of a run calls it with the same arguments.
    """
    return Capture(checkpoint, tokenizer, rows, out, settings, **options).run(processes)


class Capture:
    """A model and rows that are captured into a store. It keeps the model when it runs for several ranks in turn.

    Args:
        checkpoint: the model, found but not loaded.
        tokenizer: the model's own, under the template of the run.
        rows: prepared, so that every model of the run reads the same bytes (:func:`fusekit.data.prepare.prepare`).
        out: folder of the store.
        settings: what is kept of the distributions, and how they are captured.
        details: what else decides what the store holds, to be compared when the capture is resumed.
        overwrite: start over where there is a store.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: show no progress.
        notify: called with lines for the user, in process 0.

    Raises:
        CaptureError: the engine cannot capture what is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: RowTokenizer,
        rows: Sequence[Row],
        out: Path | str,
        settings: CaptureSettings | None = None,
        *,
        details: Mapping[str, Setting] | None = None,
        overwrite: bool = False,
        ignore_estimates: bool = False,
        quiet: bool = False,
        notify: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.checkpoint, self.tokenizer, self.rows, self.out = checkpoint, tokenizer, rows, Path(out)
        self.details, self.overwrite, self.ignore_estimates = dict(details or {}), overwrite, ignore_estimates
        self.quiet, self.notify = quiet, notify
        self.settings = settings or CaptureSettings()
        for field, mistake in loading_mistakes(checkpoint.choice):
            raise CaptureError(f"{checkpoint.choice.model}: {field}: {mistake}")
        self.vocabulary = vocabulary_size(checkpoint, tokenizer)
        self._processes: Processes | None = None
        self._spec: StoreSpec | None = None
        self._scorer: Scorer | None = None
        self._prepared = False
        self._asked = self.settings.top_k
        if self._asked > self.vocabulary:
            self.settings = self.settings.model_copy(update={"top_k": self.vocabulary})
        self._opening: Opening | None = None
        if checkpoint.choice.engine.kind != "transformers":
            self._opening = Opening(checkpoint, tokenizer, self.settings, self.vocabulary, self._say)

    def run(self, processes: Processes | None = None) -> Store:
        """Capture this process's share.

        processes: of the run; by default those of the launcher.

        Raises:
            CaptureError: the model cannot be loaded or does not fit; see :func:`capture_rows` for the rest.
            StorageError: the store cannot be written, or was made from other inputs.
        """
        self._processes = processes = processes or Processes.current()
        choice = self.checkpoint.choice
        if choice.device_map and processes.world > 1 and processes.connected:
            raise CaptureError(
                f"a model that --device-map spreads over the devices runs in one process, not in {processes.world}: "
                "start without a launcher, or leave the option out to load a whole model in every process"
            )
        if self._spec is None and self._asked > self.vocabulary:
            self._say(f"top_k is {self._asked}, but the vocabulary has {self.vocabulary} ids: all of them are kept")
        if self._spec is None and not all(row.is_text for row in self.rows):
            facts = self.tokenizer.facts
            day = f", which prints the date {facts['date']}" if "date" in facts else ""
            self._say(f"chat template of {choice.model}: {facts['chat_template']}{day}")
        return capture_rows(
            self.rows,
            self.tokenizer,
            self._load,
            self.out,
            self._make_spec,
            max_quarantined=self.settings.max_quarantined,
            overwrite=self.overwrite,
            quiet=self.quiet,
            processes=processes,
        )

    def _say(self, line: str) -> None:
        if self._processes is not None and self._processes.is_first:
            self.notify(line)

    @property
    def _head_dtype(self) -> str:
        return head_dtype(self.settings, self.checkpoint.config, parameters(self.checkpoint))

    @cached_property
    def _tokens(self) -> int:
        """How many tokens the rows have, about, from some of them."""
        some = np.unique(np.linspace(0, len(self.rows) - 1, min(_SAMPLED_ROWS, len(self.rows))).astype(np.int64))
        sampled = sum(len(self.tokenizer.tokenize(self.rows[i])) for i in some.tolist())
        return sampled * len(self.rows) // max(len(some), 1)

    def _prepare(self, processes: Processes) -> None:
        """Refuse what does not fit, and download the weights: before anything is written."""
        self._prepared = True
        needs = disk_needs(
            self.checkpoint,
            self.out,
            rows=len(self.rows),
            tokens=self._tokens,
            vocabulary=self.vocabulary,
            top_k=self.settings.top_k,
        )
        if self.checkpoint.choice.engine.probe is None:  # else transformers loads no model
            needs += memory_needs(self.checkpoint, self.settings, processes)
        for line in worth_saying(needs):
            self._say(line)
        if not self.ignore_estimates:
            refuse(needs)
        self.checkpoint.fetch(bar=not self.quiet)

    def _make_spec(self) -> StoreSpec:
        """What the store is made from; once, as weights may have to be read for it."""
        assert self._processes is not None
        known = None if self.overwrite else read_json(self.out / MANIFEST, Manifest)
        # Where all is there, nothing will be written.
        if not self._prepared and (known is None or not _is_there(self.out, known)):
            self._prepare(self._processes)
        if self._spec is not None:
            return self._spec
        in_shards = self.settings.rows_per_shard
        if in_shards is None and known is not None:
            in_shards = known.spec.rows_per_shard
        elif in_shards is None:
            # A server is taken to have an accelerator.
            device = "cuda" if self.checkpoint.choice.engine.url else self._processes.device.type
            in_shards = rows_per_shard(parameters(self.checkpoint), self._tokens / max(len(self.rows), 1), device)
        chosen = self.settings.model_copy(update={"rows_per_shard": in_shards, "head_dtype": self._head_dtype})
        details = self.details
        if self._opening is not None and known is not None and known.complete:  # its engine may be gone
            details = details | {name: one for name, one in known.spec.details.items() if name.startswith("engine_")}
        elif self._opening is not None:
            details = details | self._opening.details()
        spec = store_spec(self.checkpoint, self.tokenizer, self.rows, self.vocabulary, chosen, details=details)
        self._spec = _named_as(known, spec)
        return self._spec

    def _load(self) -> Scorer:
        assert self._processes is not None
        if self._scorer is not None:
            return self._scorer
        if self._processes.is_first and not self._prepared:
            self._prepare(self._processes)  # a shard is there, but damaged
        self.checkpoint.fetch()
        if self._opening is not None:
            now = self._opening.details()
            known = self._spec.details if self._spec is not None else now
            if changed := differences({name: known.get(name) for name in now}, now):
                raise CaptureError(
                    f"{self.out} has damaged shards, and the engine is not the one that wrote them:\n  "
                    + "\n  ".join(changed)
                    + "\nStart that engine again, or capture everything with --overwrite"
                )
            self._scorer = self._opening.start(self.rows, self._processes.device)
        else:
            self._scorer = Teacher(
                load_model(self.checkpoint, self._processes.device),
                valid_ids(self.tokenizer.tokenizer),
                self.settings.selection,
                batch_tokens=self.settings.batch_tokens,
                name=self.checkpoint.choice.model,
                notify=self._say,
                longest=longest_input(self.checkpoint),
                float32_head=self._head_dtype == "float32",
            )
        return self._scorer


def capture_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    load: Callable[[], Scorer],
    out: Path | str,
    spec: Callable[[], StoreSpec],
    *,
    max_quarantined: float = 0.01,
    overwrite: bool = False,
    quiet: bool = False,
    processes: Processes | None = None,
) -> Store:
    """Capture what anything that scores rows says about them, or what is missing of it.

    Every process of the run calls it with the same arguments. Shard i is written by process i % world; the whole store
    is there when it returns, in all of them. What was written before a failure stays, and counts at the next call.
    Separate processes do not wait for each other: the last one completes the store, the others return what is there.

    Args:
        rows: each content once, in the order of the store.
        tokenizer: reads them for this model.
        load: the model; called only if there is something to capture.
        out: folder of the store.
        spec: what the store is made from; called in process 0.
        max_quarantined: share of all rows for which the model may give no distribution; one row always may.
        overwrite, quiet, processes: as of :func:`capture`.

    Raises:
        CaptureError: see :meth:`Teacher.score`; too many rows without a distribution.
        StorageError: another run writes ``out``; it holds something else, or a store made from other inputs (says
            what differs); the disk failed.
    """
    processes = processes or Processes.current()
    path, keys, world = Path(out).resolve(), [row.key for row in rows], processes.world
    if overwrite and not processes.connected:
        raise CaptureError(
            f"{out}: separate ranks cannot start over, as each would remove what the others wrote: remove the folder "
            "first, and leave --overwrite out"
        )
    with ExitStack() as held:
        opened: list[StoreWriter] = []

        def start() -> StoreSpec:
            # Process 0 says what stands in the way before the others look; its lock is the run's.
            held.enter_context(output_lock(path))
            _refuse_ranks(path)
            if overwrite:
                remove_store(path)
            opened.append(StoreWriter(path, spec(), keys, world=world))
            _refuse_quarantined(opened[0], max_quarantined)
            return opened[0].spec

        if processes.connected:
            agreed = processes.first_then_all(start)
            writer = opened[0] if opened else StoreWriter(path, agreed, keys, processes.rank, world)
        else:
            held.enter_context(output_lock(_rank_of(path, processes.rank)))
            agreed = spec()  # each reads its own copy of the weights: not while the others wait for the lock
            with output_lock(path, PATIENCE):
                agreed = _named_as(read_json(path / MANIFEST, Manifest), agreed)
                writer = StoreWriter(path, agreed, keys, processes.rank, world, joins=True)
        if missing := writer.missing_shards():
            share = _Share(writer, rows, tokenizer, max_quarantined)
            share.capture(missing, load(), processes, quiet=quiet)
        processes.wait()

        def finish() -> bool:
            _refuse_quarantined(writer, max_quarantined)
            if not processes.connected and writer.lacking():
                return False
            writer.finish()
            return True

        if processes.connected:
            processes.first_then_all(finish)
            return Store.open(out)  # errors and reports name it as the caller does
        with output_lock(path, PATIENCE):  # whoever is last completes the store
            known = read_json(path / MANIFEST, Manifest)
            complete = bool(known and known.complete) or finish()
            if complete:
                for lock in _rank_locks(path):
                    remove(lock)
            return Store.open(out, incomplete=not complete)


def _named_as(known: Manifest | None, spec: StoreSpec) -> StoreSpec:
    """The spec, with the model called as in the manifest: the folder of the same weights may be another one now."""
    if known is None or known.spec.model_fingerprint != spec.model_fingerprint:
        return spec
    return spec.model_copy(update={"model": known.spec.model})


PATIENCE = 600.0
"""Seconds that a rank waits for the others to begin or to complete a store."""


def _rank_of(path: Path, rank: int) -> Path:
    """What the lock of a rank is named after: the same rank does not run twice."""
    return path.with_name(f"{path.name}.rank{rank}")


def _rank_locks(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.rank*.fusekit.lock"))


def _refuse_ranks(path: Path) -> None:
    """Raises StorageError when separate ranks write a store."""
    for lock in _rank_locks(path):
        name = lock.name.removeprefix(".").removesuffix(".fusekit.lock")
        with output_lock(path.with_name(name)):
            pass


@dataclass
class _Share:
    """What one process captures of a store."""

    writer: StoreWriter
    rows: Sequence[Row]
    tokenizer: Tokenizes
    max_quarantined: float

    def capture(self, missing: Sequence[ShardPlan], teacher: Scorer, processes: Processes, *, quiet: bool) -> None:
        """Capture and commit shards, one by one."""
        world = processes.world
        label = "capturing" if world == 1 else f"capturing (process {processes.rank} of {world})"
        total = sum(plan.stop - plan.start for plan in missing)
        seen = 0
        with progress(total, label, "row", quiet=quiet or not processes.is_first) as bar:

            def advance(rows: int, tokens: int) -> None:
                nonlocal seen
                seen += tokens
                if not bar.disable:
                    rate = seen / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(rows)

            for plan in missing:
                if self._write(plan, teacher, advance):
                    _refuse_quarantined(self.writer, self.max_quarantined)

    def _write(self, plan: ShardPlan, teacher: Scorer, advance: Callable[[int, int], None]) -> int:
        """Capture and commit one shard; returns how many of its rows are quarantined.

        advance: called with the rows and tokens of each batch.
        """
        rows = self.rows[plan.start : plan.stop]
        tokenized = [self.tokenizer.tokenize(row) for row in rows]
        encoded: dict[int, Future[Columns]] = {}
        quarantined: dict[str, str] = {}
        # Encoded as they come, beside the next batch: the rows of a shard take a third of the memory then.
        with ThreadPoolExecutor(1) as pool:
            for batch in teacher.score_batches(tokenized, [row.dataset for row in rows]):
                for index, scored in batch:
                    if isinstance(scored, str):
                        quarantined[rows[index].key] = scored
                    else:
                        encoded[index] = pool.submit(self.writer.codec.encode, scored)
                advance(len(batch), sum(len(tokenized[index]) for index, _ in batch))
        self.writer.write_columns(plan, [encoded[index].result() for index in sorted(encoded)], quarantined)
        return len(quarantined)


def _refuse_quarantined(writer: StoreWriter, share: float) -> None:
    """Raises CaptureError when more rows of all shards, those of earlier runs too, have no distribution than may."""
    quarantined, total = writer.quarantined(), len(writer.keys)
    allowed = max(1, int(share * total))
    if len(quarantined) > allowed:
        key, why = next(iter(quarantined.items()))
        raise CaptureError(
            f"{writer.path}: {counted(len(quarantined), 'example')} without a distribution, more than the "
            f"{allowed} of {total} that may (--max-quarantined {share:g}); the first is {key}: {why}. Are the "
            "model's weights whole, and is its dtype one that it was trained for? If so many may be missing, raise the "
            "limit: what is captured stays"
        )


def store_spec(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    vocabulary: int,
    settings: CaptureSettings,
    *,
    details: Mapping[str, Setting] | None = None,
    fingerprint: str | None = None,
) -> StoreSpec:
    """What a store is made from: model, tokenizer and template, data, and every setting that changes a value.

    settings: with the rows per shard and the head's dtype. fingerprint: of the weights, where it is known already.
    """
    assert settings.rows_per_shard is not None
    choice = checkpoint.choice
    return StoreSpec(
        model=choice.model,
        model_fingerprint=fingerprint or checkpoint.fingerprint(),
        tokenizer=tokenizer.fingerprint,
        data=data_fingerprint(rows),
        vocabulary=vocabulary,
        top_k=min(settings.top_k, vocabulary),
        keep_mass=settings.keep_mass if settings.keep_mass < 1 else None,
        temperature=settings.temperature,
        max_error=settings.max_error,
        rows_per_shard=settings.rows_per_shard,
        details=details_of(choice, tokenizer.train_on, settings) | tokenizer.facts | dict(details or {}),
    )


def details_of(choice: ModelChoice, train_on: str, settings: CaptureSettings) -> dict[str, Setting]:
    """How a model is loaded and run, and which tokens are supervised: what else decides the values of a store."""
    return {
        "dtype": choice.dtype,
        "quantization": json.dumps(choice.quantization, sort_keys=True) if choice.quantization else None,
        "attn_implementation": choice.attn_implementation,
        "engine": choice.engine.kind,
        "head_dtype": settings.head_dtype if choice.engine.kind == "transformers" else None,
        "train_on": train_on,
    }


def data_fingerprint(rows: Sequence[Row]) -> str:
    """xxh3-128 of the rows in order: their keys, where they are cut, and their sources of data."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(f"{row.key} {row.cut} {row.dataset!r}\n".encode())
    return digest.hexdigest()


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
