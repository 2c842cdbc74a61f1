"""A model and prepared rows to a store: estimated, compared with what is there, loaded, captured shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from fusekit.artifacts import output_lock
from fusekit.capturing.codec import Columns
from fusekit.capturing.engine import Teacher, rows_per_shard
from fusekit.capturing.estimate import disk_needs, memory_needs, parameters, refuse
from fusekit.capturing.load import load_model, longest_input, valid_ids
from fusekit.capturing.manifest import MANIFEST, Manifest, Setting, StoreSpec, read_json
from fusekit.capturing.models import Checkpoint, ModelChoice
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.capturing.writer import ShardPlan, StoreWriter, remove_store
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes, progress
from fusekit.errors import CaptureError
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
    details: Mapping[str, Setting] | None = None,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    quiet: bool = False,
    notify: Callable[[str], None] = lambda _line: None,
    processes: Processes | None = None,
) -> Store:
    """Capture what a model says about rows, or what is missing of it.

    Every process of a run calls it with the same arguments.

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
        processes: of the run; by default those of the launcher.

    Raises:
        CaptureError: the model cannot be loaded or does not fit; see :func:`capture_rows` for the rest.
        StorageError: the store cannot be written, or was made from other inputs.
    """
    settings, processes = settings or CaptureSettings(), processes or Processes.current()
    say = notify if processes.is_first else lambda _line: None
    if checkpoint.choice.device_map and processes.world > 1:
        raise CaptureError(
            f"a model that --device-map spreads over the devices runs in one process, not in {processes.world}: start "
            "without a launcher, or leave the option out to load a whole model in every process"
        )
    vocabulary = vocabulary_size(checkpoint, tokenizer)
    if settings.top_k > vocabulary:
        say(f"top_k is {settings.top_k}, but the vocabulary has {vocabulary} ids: all of them are kept")
        settings = settings.model_copy(update={"top_k": vocabulary})
    if not all(row.is_text for row in rows):
        facts = tokenizer.facts
        day = f", which prints the date {facts['date']}" if "date" in facts else ""
        say(f"chat template of {checkpoint.choice.model}: {facts['chat_template']}{day}")
    prepared: list[bool] = []
    tokens = cache(lambda: _count_tokens(tokenizer, rows))

    def prepare() -> None:
        prepared.append(True)
        sizes = {"rows": len(rows), "tokens": tokens(), "vocabulary": vocabulary, "top_k": settings.top_k}
        needs = disk_needs(checkpoint, Path(out), **sizes) + memory_needs(checkpoint, settings.batch_tokens, processes)
        for need in needs:
            say(str(need))
        if not ignore_estimates:
            refuse(needs)
        checkpoint.fetch(bar=not quiet)

    def spec() -> StoreSpec:
        known = None if overwrite else read_json(Path(out) / MANIFEST, Manifest)
        # Estimates and downloads come before anything is written; where all is there, nothing will be.
        if known is None or not _is_there(Path(out), known):
            prepare()
        in_shards = settings.rows_per_shard
        if in_shards is None and known is not None:
            in_shards = known.spec.rows_per_shard
        elif in_shards is None:
            in_shards = rows_per_shard(parameters(checkpoint), tokens() / max(len(rows), 1), processes.device.type)
        chosen = settings.model_copy(update={"rows_per_shard": in_shards})
        wanted = store_spec(checkpoint, tokenizer, rows, vocabulary, chosen, details=details)
        # A folder of the same weights may have been moved, or be spelled in another way.
        if known and known.spec.model_fingerprint == wanted.model_fingerprint:
            wanted = wanted.model_copy(update={"model": known.spec.model})
        return wanted

    def load() -> Teacher:
        if processes.is_first and not prepared:
            prepare()  # a shard is there, but damaged
        checkpoint.fetch()
        return Teacher(
            load_model(checkpoint, processes.device),
            valid_ids(tokenizer.tokenizer),
            settings.selection,
            batch_tokens=settings.batch_tokens,
            name=checkpoint.choice.model,
            notify=say,
            longest=longest_input(checkpoint),
        )

    share = settings.max_quarantined
    return capture_rows(
        rows, tokenizer, load, out, spec, max_quarantined=share, overwrite=overwrite, quiet=quiet, processes=processes
    )


def capture_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    load: Callable[[], Teacher],
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
    with ExitStack() as held:
        opened: list[StoreWriter] = []

        def start() -> StoreSpec:
            # Process 0 says what stands in the way before the others look; its lock is the run's.
            held.enter_context(output_lock(path))
            if overwrite:
                remove_store(path)
            opened.append(StoreWriter(path, spec(), keys, world=world))
            _refuse_quarantined(opened[0], max_quarantined)
            return opened[0].spec

        agreed = processes.first_then_all(start)
        writer = opened[0] if opened else StoreWriter(path, agreed, keys, processes.rank, world)
        if missing := writer.missing_shards():
            teacher = load()
            label = "capturing" if world == 1 else f"capturing (process 0 of {world})"
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
                    some = [(row, tokenizer.tokenize(row)) for row in rows[plan.start : plan.stop]]
                    if _write_shard(plan, some, teacher, writer, advance):
                        _refuse_quarantined(writer, max_quarantined)
        processes.wait()

        def finish() -> None:
            _refuse_quarantined(writer, max_quarantined)
            writer.finish()

        processes.first_then_all(finish)
    return Store.open(out)  # errors and reports name it as the caller does


def _write_shard(
    plan: ShardPlan,
    rows: Sequence[tuple[Row, TokenizedRow]],
    teacher: Teacher,
    writer: StoreWriter,
    advance: Callable[[int, int], None],
) -> int:
    """Capture and commit one shard; returns how many of its rows are quarantined.

    advance: called with the rows and tokens of each batch.
    """
    encoded: dict[int, Future[Columns]] = {}
    quarantined: dict[str, str] = {}
    # Encoded as they come, beside the next batch: the rows of a shard take a third of the memory then.
    with ThreadPoolExecutor(1) as pool:
        for batch in teacher.score_batches([tokens for _, tokens in rows], [row.dataset for row, _ in rows]):
            for index, scored in batch:
                if isinstance(scored, str):
                    quarantined[rows[index][0].key] = scored
                else:
                    encoded[index] = pool.submit(writer.codec.encode, scored)
            advance(len(batch), sum(len(rows[index][1]) for index, _ in batch))
    writer.write_columns(plan, [encoded[index].result() for index in sorted(encoded)], quarantined)
    return len(quarantined)


def _refuse_quarantined(writer: StoreWriter, share: float) -> None:
    """Raises CaptureError when more rows of all shards, those of earlier runs too, have no distribution than may."""
    quarantined, total = writer.quarantined(), len(writer.keys)
    allowed = max(1, int(share * total))
    if len(quarantined) > allowed:
        key, why = next(iter(quarantined.items()))
        raise CaptureError(
            f"{writer.path}: {len(quarantined)} examples have no distribution, more than the {allowed} of {total} "
            f"that may (--max-quarantined {share:g}); the first is {key}: {why}. Are the model's weights whole, and is "
            "its dtype one that it was trained for? If so many may be missing, raise the limit: what is captured stays"
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

    settings: with a number of rows per shard. fingerprint: of the weights, where it is known already.
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
        details=details_of(choice, tokenizer.train_on) | tokenizer.facts | dict(details or {}),
    )


def details_of(choice: ModelChoice, train_on: str) -> dict[str, Setting]:
    """How a model is loaded, and which tokens are supervised: what else decides the values of a store."""
    return {
        "dtype": choice.dtype,
        "quantization": json.dumps(choice.quantization, sort_keys=True) if choice.quantization else None,
        "attn_implementation": choice.attn_implementation,
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


def _count_tokens(tokenizer: RowTokenizer, rows: Sequence[Row]) -> int:
    """How many tokens the rows have, about, from some of them."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows))).astype(np.int64)).tolist()
    sampled = sum(len(tokenizer.tokenize(rows[i])) for i in picked)
    return sampled * len(rows) // max(len(picked), 1)
